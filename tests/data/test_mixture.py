"""Several sources: one stream, or with weights each its share of training."""

import itertools
import json

import pytest
from commands import command
from sentences import one_sentence
from test_corpus import tokenizer, words  # noqa: F401 - a fixture
from transformers import AutoTokenizer

from ds_local.data import documents
from ds_local.data.corpus import prepare
from ds_local.data.dataset import BatchShape, TokenData, training_batches
from ds_local.errors import DataError


@pytest.fixture
def places(tmp_path):
    """A large source and a small one, told apart by their letters."""
    for name, count, capital in (("large", 60, False), ("small", 20, True)):
        texts = (words(60, seed) for seed in range(count))
        lines = [json.dumps({"text": t.upper() if capital else t}) for t in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def make(places, tokenizer, *sources, **how):  # noqa: F811
    output = places / "data"
    facts = prepare(
        [
            str(places / one) if "=" not in one else one.replace("=", f"={places}/")
            for one in sources
        ],
        tokenizer,
        16,
        output,
        progress=False,
        **how,
    )
    return facts, TokenData(output)


def passes(data, steps):
    """How often each sequence came."""
    batches = training_batches(data, 3, 0, BatchShape(1, 1, 1, 0))
    texts = [tuple(next(batches)[0][0].tolist()) for _ in range(steps)]
    return {text: texts.count(text) for text in texts}


def test_with_weights_training_sees_the_shares(places, tokenizer):  # noqa: F811
    facts, data = make(places, tokenizer, "a=large.jsonl@1", "b=small.jsonl@3")
    first, second = facts["mixture"]
    assert (first["name"], second["name"]) == ("a", "b")
    assert (first["place"], first["weight"]) == (f"{places}/large.jsonl", 1.0)
    assert first["documents"] + second["documents"] == facts["documents"] == 80
    total = data.num_sequences("train")
    assert first["sequences"] + second["sequences"] == total
    assert second["share"] == round(total * 0.75) / total
    assert second["passes"] == round(total * 0.75) / second["sequences"]
    capitals = data.sequences("train", range(first["sequences"], total)).tolist()
    rows = passes(data, total)
    found = {text: count for text, count in rows.items() if list(text) in capitals}
    assert sum(found.values()) == round(total * 0.75)
    assert len(found) == second["sequences"]
    assert max(found.values()) - min(found.values()) <= 1


def test_without_weights_shares_are_those_of_the_tokens(places, tokenizer):  # noqa: F811
    facts, data = make(places, tokenizer, "large.jsonl", "small.jsonl")
    shares = [one["share"] for one in facts["mixture"]]
    assert sum(shares) == pytest.approx(1)
    assert shares[0] == facts["mixture"][0]["tokens"] / facts["tokens"]
    assert [one["passes"] for one in facts["mixture"]] == [1.0, 1.0]
    assert set(passes(data, data.num_sequences("train")).values()) == {1}


def test_weights_are_part_of_the_fingerprint(places, tokenizer):  # noqa: F811
    prints = {
        make(places, tokenizer, f"a=large.jsonl@{weight}", "b=small.jsonl@1")[0]["fingerprint"]
        for weight in (1, 2)
    }
    assert len(prints) == 2


def test_validation_text_of_its_own(places, tokenizer):  # noqa: F811
    facts, _ = make(
        places, tokenizer, "large.jsonl", validation_sources=[str(places / "small.jsonl")]
    )
    whole, _ = make(places, tokenizer, "large.jsonl", "small.jsonl")
    assert facts["tokens"] == whole["tokens"]
    assert facts["validation_sources"] == [f"{places}/small.jsonl"]
    assert [one["name"] for one in facts["mixture"]] == [f"{places}/large.jsonl"]
    assert facts["mixture"][0]["documents"] == 60
    assert facts["documents"] == 80
    alone, _ = make(places, tokenizer, "small.jsonl")
    assert facts["bytes"]["validation"] == sum(alone["bytes"].values())
    assert (
        facts["sequences"]["validation"] == (facts["tokens"] - facts["mixture"][0]["tokens"]) // 16
    )


@pytest.mark.parametrize(
    ("sources", "how", "said"),
    [
        (["a=large.jsonl@1", "b=tiny.txt@1"], {}, "the source 'b' has 3 tokens, too few for a seq"),
        (["large.jsonl"], {"validation_sources": ["large.jsonl"]}, "is a source and a validation"),
        (["large.jsonl"], {"validation_sources": ["small.jsonl@2"]}, "has a weight; all of it is"),
        (["large.jsonl"], {"validation_sources": ["nowhere"]}, "nowhere' does not exist"),
        (["large.jsonl"], {"validation_sources": ["empty.txt"]}, "the sources hold no text"),
        (["large.jsonl"], {"validation_sources": ["tiny.txt"]}, "3 tokens for validation, too few"),
    ],
)
def test_mixtures_that_cannot_be(places, tokenizer, sources, how, said):  # noqa: F811
    (places / "tiny.txt").write_text("aaa")
    (places / "empty.txt").write_text("")
    how = {key: [f"{places}/{one}" for one in value] for key, value in how.items()}
    with one_sentence(said, error=DataError):
        make(places, tokenizer, *sources, **how)
    assert not (places / "data").exists()


@pytest.mark.parametrize(
    ("source", "held", "skip"),
    [
        ("texts", "texts/held.txt", "held.txt"),
        ("texts", "texts/deep/held", "deep/held/*"),
        ("texts/deep", "texts", "deep/*"),
        ("texts", "link/held.txt", "held.txt"),
        ("linked", "texts/held.txt", "other.txt"),  # a link in a folder
        ("texts/held.txt", "linked", "other.txt"),
    ],
)
def test_validation_text_inside_of_a_source(places, tokenizer, source, held, skip):  # noqa: F811
    for name in ("texts/held.txt", "texts/deep/a.txt", "texts/deep/held/b.txt", "linked/c.txt"):
        (places / name).parent.mkdir(parents=True, exist_ok=True)
        (places / name).write_text("to be or not to be " * 40)
    (places / "texts" / "a.txt").write_text("that is the question " * 40)
    (places / "link").symlink_to("texts")
    (places / "linked" / "other.txt").symlink_to("../texts/held.txt")
    how = {"validation_sources": [f"{places}/{held}"]}
    with one_sentence(f"{places}/{held}", f"--skip '{skip}'", "trained on", error=DataError):
        make(places, tokenizer, source, **how)
    facts, _ = make(places, tokenizer, source, skip=[skip], **how)
    assert facts["skipped"]["left out by --skip"] >= 1


def test_the_command_says_the_shares(places, tokenizer):  # noqa: F811
    done = command(
        *("prepare", "--tokenizer", tokenizer, "--seq-len", 16, "--output", places / "data"),
        *("--source", f"big={places}/large.jsonl@3", f"b={places}/small.jsonl@1"),
    )
    assert done.returncode == 0, done.stderr
    _, first, second = done.stdout.splitlines()
    assert first.startswith("big   7")
    assert second.startswith("b     25.0")
    assert second.endswith(" times a pass")


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_processes_makes_the_same_folder(places, tokenizer, workers):  # noqa: F811
    def content(count):
        make(places, tokenizer, "a=large.jsonl@1", "b=small.jsonl@3", workers=count)
        files = sorted(path for path in (places / "data").rglob("*") if path.is_file())
        return {str(path.relative_to(places)): path.read_bytes() for path in files}

    assert content(workers) == content(1)


@pytest.mark.parametrize("weights", [("", ""), ("@1", "@2")])
def test_pieces_of_long_documents_in_both_splits_have_borders(
    places,
    tokenizer,  # noqa: F811
    monkeypatch,
    weights,
):
    """Documents of 20 pieces, each with a letter of its own: no two meet without an end between
    them, and no piece meets the one after the next."""
    monkeypatch.setattr(documents, "PIECE", 50)
    for name, letters in (("first", "abcdef"), ("second", "ghijkl")):
        lines = [
            json.dumps({"text": "".join(f"{letter}{n % 10}" * 25 for n in range(20))})
            for letter in letters
        ]
        (places / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [f"first=first.jsonl{weights[0]}", f"second=second.jsonl{weights[1]}"]
    facts, data = make(places, tokenizer, *sources, validation_share=0.3, document_mask=True)
    held = AutoTokenizer.from_pretrained(places / "data" / "tokenizer")
    assert sum(one["tokens"] for one in facts["mixture"]) == facts["tokens"]
    for split in ("train", "validation"):
        rows = held.batch_decode(data.sequences(split, range(data.num_sequences(split))).tolist())
        for part in itertools.chain.from_iterable(row.split(held.eos_token) for row in rows):
            text = part.replace(" ", "")
            assert len(set(filter(str.isalpha, text))) <= 1, text
            numbers = [int(one) for one in text if one.isdigit()]
            assert {(b - a) % 10 for a, b in itertools.pairwise(numbers)} <= {0, 1}, text
