"""A written tokenizer gives the ids of the one it was made from, beside any model; others are told
apart by their ids."""

import json
import shutil

import pytest
from families import VARIANTS
from sentences import one_sentence
from test_corpus import tokenizer, words  # noqa: F401 - a fixture
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ds_local.data import tokenizers
from ds_local.data.corpus import prepare
from ds_local.data.tokenizers import (
    chat_of,
    check_same_tokenizer,
    difference,
    fingerprint,
    load_tokenizer,
    save_tokenizer,
)
from ds_local.errors import DataError, ExportError

FAMILIES = {fields["model_type"]: fields for fields in VARIANTS.values()}
TEXTS = [
    "def f(x):\n    return  x",
    "  two spaces, \ttab\r\n\n",
    "héllo wörld ☃ 日本語 \U0001f600",
    " " + words(50, 7),
    "",
    "</s> <s> x<|endoftext|>y",
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """As GPT-2's."""
    folder = tmp_path_factory.mktemp("byte-level")
    made = ByteLevelBPETokenizer()
    made.train_from_iterator([words(2000)], vocab_size=400, special_tokens=["<|endoftext|>"])
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, eos_token=end, bos_token=end
    ).save_pretrained(folder)
    return str(folder)


def model_folder(place, family):
    place.mkdir()
    (place / "config.json").write_text(json.dumps(FAMILIES[family]))
    return place


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_a_written_tokenizer_loads_as_it_was(tmp_path, tokenizer, byte_level, family, kind):  # noqa: F811
    original = load_tokenizer(tokenizer if kind == "sentencepiece" else byte_level)
    folder = model_folder(tmp_path / "model", family)
    save_tokenizer(original, folder, ExportError)
    for loaded in (
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(shutil.copytree(folder, tmp_path / "elsewhere")),
    ):
        for text in TEXTS:
            for special in (True, False):
                ids = original(text, add_special_tokens=special)["input_ids"]
                assert loaded(text, add_special_tokens=special)["input_ids"] == ids
            assert loaded.decode(ids) == original.decode(ids)
        assert loaded.eos_token_id == original.eos_token_id
    assert json.loads((folder / "config.json").read_text()) == FAMILIES[family]
    assert check_same_tokenizer(folder, original.name_or_path)


def test_what_cannot_be_written_right_is_refused(tmp_path, tokenizer, monkeypatch):  # noqa: F811
    folder = model_folder(tmp_path / "model", "qwen2")
    for ways in ("_BY_ITS_FILE", "_NOT_THE_FAMILYS"):
        monkeypatch.setattr(tokenizers, ways, {})
    with one_sentence("cannot be written so that", error=ExportError):
        save_tokenizer(load_tokenizer(tokenizer), folder, ExportError)


def test_a_familys_own_tokenizer_in_place_of_the_datas(tmp_path, tokenizer):  # noqa: F811
    """The files are those of the data, but transformers loads them as Qwen's: not refused."""
    folder = model_folder(tmp_path / "model", "qwen2")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    assert difference(load_tokenizer(tokenizer), load_tokenizer(folder))
    assert check_same_tokenizer(folder, tokenizer)


def other_text(place, tokenizer):  # noqa: F811
    place.mkdir()
    (place / "a.txt").write_text(words(3000, 99).upper().replace(" ", "\n"))
    size = len(load_tokenizer(tokenizer))
    prepare([str(place / "a.txt")], f"sentencepiece:{size}", 16, place / "data", progress=False)
    return place / "data" / "tokenizer"


def other_merges(place, tokenizer):  # noqa: F811
    """The same vocabulary, used otherwise."""
    shutil.copytree(tokenizer, place)
    fields = json.loads((place / "tokenizer.json").read_text())
    fields["model"]["merges"] = fields["model"]["merges"][::-1]
    (place / "tokenizer.json").write_text(json.dumps(fields))
    return place


def one_more(place, tokenizer):  # noqa: F811
    more = AutoTokenizer.from_pretrained(tokenizer)
    more.add_tokens(["<one more>"])
    more.save_pretrained(place)
    return place


def other_end(place, tokenizer):  # noqa: F811
    AutoTokenizer.from_pretrained(tokenizer, eos_token="<s>").save_pretrained(place)
    return place


def space_in_front(place, tokenizer):  # noqa: F811
    shutil.copytree(tokenizer, place)
    bare = Tokenizer.from_file(str(place / "tokenizer.json"))
    fields = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps(fields | {"add_prefix_space": True}))
    bare.save(str(place / "tokenizer.json"))
    return place


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_text, "it gives"),
        (other_merges, "it gives"),
        (one_more, "it has 401 tokens instead of 400"),
        (other_end, "its end-of-text token is 1 instead of 2"),
        (space_in_front, "it gives"),
    ],
)
def test_other_tokenizers_are_told_apart(tmp_path, tokenizer, change, said):  # noqa: F811
    other = change(tmp_path / "other", tokenizer)
    own, theirs = load_tokenizer(tokenizer), load_tokenizer(other)
    assert said in difference(own, theirs)
    if change is not other_end:
        assert fingerprint(own) != fingerprint(theirs)
    with one_sentence(f"the pretrained model in {other}", said, "--tokenizer", error=DataError):
        check_same_tokenizer(other, tokenizer)


def test_the_same_tokenizer_and_none(tmp_path, tokenizer):  # noqa: F811
    copy = shutil.copytree(tokenizer, tmp_path / "copy")
    assert difference(load_tokenizer(tokenizer), load_tokenizer(copy)) == ""
    assert fingerprint(load_tokenizer(tokenizer)) == fingerprint(load_tokenizer(copy))
    assert check_same_tokenizer(model_folder(tmp_path / "model", "llama"), tokenizer) is False


# --- a bare vocabulary


def vocabulary(folder, prefix="", end="<|endoftext|>"):
    """vocab.json and merges.txt, as GPT-2's or Megatron's."""
    folder.mkdir(exist_ok=True)
    made = ByteLevelBPETokenizer()
    made.train_from_iterator([words(2000)], vocab_size=400, special_tokens=[end])
    made.save_model(str(folder), prefix or None)
    return made


@pytest.mark.parametrize("prefix", ["", "gpt2"])
@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>"])
def test_a_bare_vocabulary_is_a_tokenizer(tmp_path, prefix, end):
    made = vocabulary(tmp_path / "bare", prefix, end)
    (tmp_path / "a.txt").write_text(words(2000, 3) + " héllo ☃\n\n")
    spec = str(tmp_path / "bare")
    facts = prepare([str(tmp_path / "a.txt")], spec, 16, tmp_path / "data", progress=False)
    assert (facts["vocab_size"], facts["eos_token_id"]) == (400, 0)
    written = AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer")
    assert written.eos_token == end
    for text in TEXTS[:4]:
        assert written(text, add_special_tokens=False)["input_ids"] == made.encode(text).ids


def edit_vocabulary(change):
    def changed(folder):
        tokens = json.loads((folder / "vocab.json").read_text())
        (folder / "vocab.json").write_text(json.dumps(change(tokens)))

    return changed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edit_vocabulary(list), "vocab.json is no vocabulary"),
        (edit_vocabulary(lambda t: {**t, "x": "1"}), "vocab.json is no vocabulary"),
        (edit_vocabulary(lambda t: {**t, "low</w>": 400}), "is of a BPE of words"),
        (
            edit_vocabulary(lambda t: {**t, "gap": 500}),
            "401 tokens, whose ids are not 0 to 400",
        ),
        (
            edit_vocabulary(lambda t: {k: i for i, k in enumerate(list(t)[1:])}),
            "vocab.json has no end-of-text token; add one of <|endoftext|>, ",
        ),
        (lambda p: (p / "vocab.json").write_text("{"), "cannot load the tokenizer"),
        (lambda p: (p / "merges.txt").write_text("a b c d\n" * 9), "cannot load the tokenizer"),
        (lambda p: (p / "merges.txt").write_text("zz yy\n"), "cannot load the tokenizer"),
        (lambda p: (p / "merges.txt").unlink(), "cannot load the tokenizer"),
        (lambda p: (p / "old-vocab.json").write_text("{}"), "cannot load the tokenizer"),
    ],
)
def test_vocabularies_that_cannot_be_used(tmp_path, change, said):
    vocabulary(tmp_path / "bare")
    change(tmp_path / "bare")
    with one_sentence(said, str(tmp_path / "bare"), error=DataError):
        load_tokenizer(tmp_path / "bare")


def test_messages_become_text_by_the_tokenizers_template(tmp_path, byte_level):
    chat = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "dad"}]
    loaded = load_tokenizer(byte_level)
    assert chat_of(loaded)(chat) == "user: abc\n\nassistant: dad"
    loaded.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    loaded.save_pretrained(tmp_path / "chat")
    row = json.dumps({"messages": chat})
    (tmp_path / "a.jsonl").write_text(f"{row}\n" * 50)

    def facts():
        return prepare(
            *([str(tmp_path / "a.jsonl")], str(tmp_path / "chat"), 16, tmp_path / "data"),
            progress=False,
            text_fields=["messages"],
        )

    end = "<|endoftext|>"
    text = f"<user>abc{end}<assistant>dad{end}"
    assert facts()["tokens"] == 50 * len(loaded(text)["input_ids"])  # no second end behind it
    (tmp_path / "a.jsonl").write_text(row.replace("user", "system"))
    with one_sentence("line 1 the chat template refuses", "no system", error=DataError):
        facts()
