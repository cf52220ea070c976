"""Reading: the order is a pure function of (seed, step), whatever the layout."""

import json
import shutil

import datasets
import pytest
import torch
from sentences import one_sentence
from test_corpus import tokenizer, words  # noqa: F401 - a fixture

from ds_local import outputs
from ds_local.data.corpus import prepare
from ds_local.data.dataset import (
    BatchShape,
    Facts,
    TokenData,
    evenly_spaced,
    training_batches,
    validation_batches,
)
from ds_local.errors import DataError
from ds_local.model.heads import IGNORE
from ds_local.outputs.lists import seal


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):  # noqa: F811
    place = tmp_path_factory.mktemp("data")
    (place / "a.txt").write_text(words(4000))
    prepare([str(place / "a.txt")], tokenizer, 16, place / "data", progress=False)
    return place / "data"


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_replicas_and_micro_batches_share_out_the_same_step(folder):
    data = TokenData(folder)
    whole = take(training_batches(data, 5, 0, BatchShape(8, 1, 1, 0)), 3)
    for shape in ((2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 8, 1)):
        size, count, replicas = shape
        parts = [
            training_batches(data, 5, 0, BatchShape(size, count, replicas, r))
            for r in range(replicas)
        ]
        for ids, _ in whole:
            pieces = [next(part)[0] for _ in range(count) for part in parts]
            assert torch.equal(torch.cat(pieces), ids)


def test_resuming_at_a_step_gives_the_batches_of_that_step(folder):
    data = TokenData(folder)
    shape = BatchShape(2, 3, 1, 0)
    straight = take(training_batches(data, 5, 0, shape), 30)
    resumed = take(training_batches(data, 5, 7 * shape.per_step, shape), 9)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(straight[21:], resumed, strict=True))


def test_validation_covers_every_sequence_once_and_fills_up_with_what_does_not_count(folder):
    data = TokenData(folder)
    total = data.num_sequences("validation")
    for size, replicas in ((4, 1), (3, 2), (7, 3)):
        seen = 0
        for replica in range(replicas):
            for ids, labels in validation_batches(data, BatchShape(size, 1, replicas, replica)):
                assert ids.shape == labels.shape == (size, 16)
                counts = (labels != IGNORE).any(1)
                seen += int(counts.sum())
                assert torch.equal(labels[counts], ids[counts])
        assert seen == total


def test_some_validation_sequences_are_evenly_spaced_whatever_the_layout(folder):
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(3, 9) == evenly_spaced(3) == [0, 1, 2]
    for count in (0, -1):
        with one_sentence("give at least 1"):
            evenly_spaced(10, count)
    data = TokenData(folder)
    wanted = data.sequences("validation", evenly_spaced(data.num_sequences("validation"), 3))
    for size, replicas in ((2, 1), (1, 2), (5, 1)):
        found = []
        for replica in range(replicas):
            some = validation_batches(data, BatchShape(size, 1, replicas, replica), max_sequences=3)
            assert len(some) == -(-3 // (size * replicas))
            for micro_batch, (ids, labels) in enumerate(some):
                counts = (labels != IGNORE).any(1)
                found += [(micro_batch, replica, row) for row in ids[counts].tolist()]
        assert [row for _, _, row in sorted(found, key=lambda f: f[:2])] == wanted.tolist()


def test_validation_batches_are_read_when_they_are_asked_for(folder, monkeypatch):
    read = []
    data = TokenData(folder)
    whole = data.sequences
    monkeypatch.setattr(data, "sequences", lambda split, i: read.append(len(i)) or whole(split, i))
    batches = validation_batches(data, BatchShape(1, 1, 1, 0))
    assert len(batches) == data.num_sequences("validation") > 1
    assert read == []
    next(iter(batches))
    assert read == [1]
    assert torch.equal(batches[-1][0], batches[len(batches) - 1][0])
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_batches_of_a_folder_with_a_document_mask_tell_documents_apart(tmp_path, tokenizer):  # noqa: F811
    lines = [json.dumps({"text": words(9, seed)}) for seed in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    def make(name, mask):
        made = [str(tmp_path / "a.jsonl")], tokenizer, 16, tmp_path / name
        return prepare(*made, progress=False, document_mask=mask), TokenData(tmp_path / name)

    facts, data = make("with", True)
    plain_facts, plain = make("without", False)
    assert facts["fingerprint"] != plain_facts["fingerprint"]
    assert facts["sequences"] == plain_facts["sequences"]
    shape, end = BatchShape(4, 1, 1, 0), facts["eos_token_id"]
    sides = [training_batches(one, 0, 0, shape) for one in (data, plain)]
    pairs = zip(take(sides[0], 9), take(sides[1], 9), strict=True)
    validation = zip(validation_batches(data, shape), validation_batches(plain, shape), strict=True)
    begun = 0
    for (inputs, labels), (ids, plain_labels) in (*pairs, *validation):
        assert torch.equal(inputs["input_ids"], ids)
        positions = inputs["position_ids"]
        assert (positions[:, 0] == 0).all()
        after_end = ids[:, :-1] == end
        assert torch.equal(positions[:, 1:] == 0, after_end)
        assert torch.equal(positions[:, 1:][~after_end], positions[:, :-1][~after_end] + 1)
        begins = positions == 0
        assert (labels[begins] == IGNORE).all()
        assert torch.equal(labels[~begins], plain_labels[~begins])
        begun += int(after_end.sum())
    assert begun > 9


def test_ids_beyond_the_vocabulary_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "data")
    edit(copy, vocab_size=100)
    with pytest.raises(DataError, match="belongs to another tokenizer"):
        TokenData(copy).sequences("train", range(20))


def edit(folder, drop=None, **changes):
    """Change prepared.json as a program would that keeps the checksums right."""
    facts = json.loads((folder / "prepared.json").read_text()) | changes
    facts.pop(drop, None)
    (folder / "prepared.json").write_text(json.dumps(facts))
    reseal(folder)


def reseal(folder):
    listed = outputs.read_list(folder)
    (folder / outputs.FILES).unlink()
    seal(folder, listed["kind"], listed["about"])


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def arrow(folder, split="train"):
    return next((folder / split).glob("*.arrow"))


def source(weight, sequences):
    counts = {"documents": 1, "tokens": 9, "share": 0.5, "passes": 1.0}
    return {"name": "a", "place": "a", "weight": weight, "sequences": sequences, **counts}


def other_split(folder, columns):
    shutil.rmtree(folder / "train")
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "train")
    reseal(folder)


# what is done to a data folder, what is said
DAMAGES = {
    "nothing there": (shutil.rmtree, "is not a complete data folder"),
    "a file": (lambda p: shutil.rmtree(p) or p.write_text("x"), "is not a complete data folder"),
    "empty": (lambda p: shutil.rmtree(p) or p.mkdir(), "is not a complete data folder"),
    "no facts": (lambda p: (p / "prepared.json").unlink(), "is not a complete data folder"),
    "half facts": (
        lambda p: (p / "prepared.json").write_text("{"),
        "is not a complete data folder",
    ),
    "no text": (
        lambda p: (p / "prepared.json").write_bytes(b"\xff"),
        "is not a complete data folder",
    ),
    "facts of another kind": (
        lambda p: (p / "prepared.json").write_text("[1]"),
        "data format None",
    ),
    "other format": (
        lambda p: edit(p, format=99),
        "has data format 99, this version reads 3; prepare it again",
    ),
    "earlier format": (lambda p: edit(p, format=1), "has data format 1"),
    "edited facts": (
        lambda p: flip(p / "prepared.json", -9),
        "prepared.json changed since it was written",
    ),
    "longer facts": (lambda p: (p / "prepared.json").open("a").write("\n"), "prepared.json has"),
    "no list": (
        lambda p: (p / outputs.FILES).unlink(),
        "ds_local_files.json is missing or damaged; prepare the data again, in another folder",
    ),
    "half a list": (
        lambda p: (p / outputs.FILES).write_text("{"),
        "ds_local_files.json is missing or damaged",
    ),
    "a list of numbers": (
        lambda p: (p / outputs.FILES).write_text("[3]"),
        "ds_local_files.json is missing or",
    ),
    "first bit": (lambda p: flip(arrow(p), -400), "changed since it was written"),
    "validation bit": (
        lambda p: flip(arrow(p, "validation"), -400),
        "validation/data-00000-of-00001.arrow changed",
    ),
    "truncated": (lambda p: arrow(p).write_bytes(arrow(p).read_bytes()[:-8]), "bytes instead of"),
    "empty shard": (lambda p: arrow(p).write_bytes(b""), "has 0 bytes instead of"),
    "missing shard": (lambda p: arrow(p).unlink(), "train/data-00000-of-00001.arrow is missing"),
    "missing split": (lambda p: shutil.rmtree(p / "validation"), "is missing"),
    "tokenizer gone": (lambda p: shutil.rmtree(p / "tokenizer"), "tokenizer.json is missing"),
    "tokenizer edited": (
        lambda p: flip(p / "tokenizer" / "tokenizer.json", 900),
        "tokenizer.json changed",
    ),
    "fewer sequences": (
        lambda p: other_split(p, {"input_ids": [[1] * 16] * 3}),
        "holds {'train': 3",
    ),
    "no sequences": (
        lambda p: edit(p, sequences={"train": 1}),
        "sequences.validation: field required",
    ),
    "zero sequences": (
        lambda p: edit(p, sequences={"train": 0, "validation": 1}),
        "sequences.train: input should be greater",
    ),
    "weights of other sequences": (
        lambda p: edit(p, mixture=[source(1, 7), source(2, 8)]),
        "mixture: sources of 15 sequences for",
    ),
    "weights below 0": (lambda p: edit(p, mixture=[source(-1, 7)]), "mixture.0.weight: input"),
    "split gone": (
        lambda p: shutil.rmtree(p / "train") or reseal(p),
        "holds no sequences that can be read",
    ),
    **{
        f"without {key}": (
            lambda p, key=key: edit(p, drop=key),
            f"prepared.json: {key}: field required",
        )
        for key in sorted(Facts.__annotations__.keys() - {"format"})
    },
    **{
        f"{key} {value!r}": (
            lambda p, key=key, value=value: edit(p, **{key: value}),
            f"prepared.json: {key}",
        )
        for key, value in (
            ("seq_len", -3),
            ("seq_len", 0),
            ("seq_len", "16"),
            ("seq_len", 16.5),
            ("seq_len", None),
            ("seq_len", True),
            ("vocab_size", -1),
            ("vocab_size", [400]),
            ("eos_token_id", -1),
            ("tokens", float("inf")),
            ("fingerprint", 12),
            ("skipped", []),
            ("sources", "a.txt"),
            ("validation_sources", None),
            ("document_mask", 1),
            ("mixture", {}),
            ("mixture", [{"name": "a"}]),
            ("bytes", 3),
        )
    },
}


def test_a_folder_of_the_version_before_is_read(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "data")
    for key in ("mixture", "validation_sources", "document_mask"):
        edit(copy, drop=key)
    edit(copy, format=2)
    new, old = TokenData(folder), TokenData(copy)
    assert old.order == new.order
    shape = BatchShape(4, 1, 1, 0)
    for (ids, _), (other, _) in zip(
        take(training_batches(new, 1, 0, shape), 9),
        take(training_batches(old, 1, 0, shape), 9),
        strict=True,
    ):
        assert torch.equal(ids, other)


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_folders_are_refused(folder, tmp_path, what):
    copy = shutil.copytree(folder, tmp_path / "data")
    change, said = DAMAGES[what]
    change(copy)
    with one_sentence(str(copy), said, error=DataError):
        TokenData(copy)


def test_every_flipped_bit_of_a_token_is_noticed(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "data")
    ids = TokenData(copy).sequences("train", [5]).to(torch.uint16).numpy().tobytes()
    start = arrow(copy).read_bytes().index(ids)
    for bit in range(0, 8 * len(ids), 7):
        content = bytearray(arrow(copy).read_bytes())
        content[start + bit // 8] ^= 1 << bit % 8
        whole = arrow(copy).read_bytes()
        arrow(copy).write_bytes(content)
        with pytest.raises(DataError, match=r"train/data-.*arrow changed"):
            TokenData(copy)
        assert TokenData(copy, verify=False).num_sequences("train")
        arrow(copy).write_bytes(whole)
    TokenData(copy)
