"""From files of all kinds to a data folder: what is no text is counted or refused, never guessed
at."""

import json
from collections import Counter

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from ds_local.data.corpus import documents, prepare
from ds_local.data.dataset import TokenData
from ds_local.errors import DataError


def words(number, seed=0):
    rng = np.random.default_rng(seed)
    return " ".join(
        "".join(rng.choice(list("abcdefghij"), rng.integers(2, 7))) for _ in range(number)
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer folder to reuse; training one for every test would be slow."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("\n".join(words(50, seed) for seed in range(200)))
    prepare([str(folder / "a.txt")], "sentencepiece:400", 16, folder / "data", progress=False)
    return str(folder / "data" / "tokenizer")


def make(tmp_path, tokenizer, *sources, seq_len=16):
    return prepare([str(s) for s in sources], tokenizer, seq_len, tmp_path / "data", progress=False)


def test_text_comes_back_as_it_was(tmp_path, tokenizer):
    text = "def f(x):\n    return 'héllo ☃'  # two  spaces\t\ttabs\n" * 200
    (tmp_path / "a.txt").write_text(text)
    facts = make(tmp_path, tokenizer, tmp_path / "a.txt")
    data = TokenData(tmp_path / "data")
    loaded = AutoTokenizer.from_pretrained(data.tokenizer_folder)
    ids = data.sequences("train", range(data.num_sequences("train"))).flatten().tolist()
    assert text.startswith(loaded.decode(ids, skip_special_tokens=True))
    assert facts["sequences"]["validation"] >= 1
    assert facts["vocab_size"] == len(loaded) == data.vocab_size


def test_documents_are_separated(tmp_path, tokenizer):
    lines = [json.dumps({"text": words(30, seed)}) for seed in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    facts = make(tmp_path, tokenizer, tmp_path / "a.jsonl")
    data = TokenData(tmp_path / "data")
    ends = sum(
        (data.sequences(split, range(data.num_sequences(split))) == facts["eos_token_id"]).sum()
        for split in facts["sequences"]
    )
    assert facts["documents"] == 50
    assert 47 <= ends <= 50  # the last ones may fall into the remainder that fills no sequence


def test_files_folders_jsonl_and_parquet(tmp_path, tokenizer):
    folder = tmp_path / "corpus" / "deep"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text(words(300, 1))
    (folder / "b.md").write_text(words(300, 2))
    (folder / "c.jsonl").write_text(json.dumps({"text": words(300, 3)}) + "\n")
    datasets.Dataset.from_dict({"text": [words(300, 4), words(300, 5)]}).to_parquet(
        str(folder / "d.parquet")
    )
    skipped = Counter()
    names = [d.name for d in documents([str(tmp_path / "corpus")], skipped)]
    assert names == [
        "deep/a.txt:0",
        "deep/b.md:0",
        "deep/c.jsonl:0",
        "deep/d.parquet:0",
        "deep/d.parquet:1",
    ]
    assert make(tmp_path, tokenizer, tmp_path / "corpus")["documents"] == 5


def test_what_is_no_text_is_counted(tmp_path, tokenizer):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "good.txt").write_text(words(2000))
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbf" + words(50).encode())
    (folder / "crlf.txt").write_bytes(words(50).replace(" ", "\r\n").encode())
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "binary.bin").write_bytes(b"abc\0def")
    (folder / "latin1.txt").write_bytes("é".encode("latin-1") * 10)
    facts = make(tmp_path, tokenizer, folder)
    assert facts["skipped"] == {"empty": 2, "NUL bytes": 1, "invalid UTF-8": 1}
    assert facts["documents"] == 3
    first = next(d for d in documents([str(folder)], Counter()) if d.name.startswith("bom"))
    assert not first.text.startswith("\ufeff")


@pytest.mark.parametrize("name", [f"{n}.txt" for n in range(60)])
def test_one_small_file_gives_both_splits_whatever_its_name(tmp_path, tokenizer, name):
    (tmp_path / name).write_text(words(300))
    facts = make(tmp_path, tokenizer, tmp_path / name)
    assert facts["sequences"]["train"] > facts["sequences"]["validation"] >= 1


@pytest.mark.slow
def test_a_line_of_50_megabytes(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(words(11_000)[:50_000] * 1000)
    facts = make(tmp_path, tokenizer, tmp_path / "a.txt", seq_len=512)
    assert facts["documents"] == 1
    assert sum(facts["bytes"].values()) == 50_000_000
    assert facts["sequences"]["validation"] > 100


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"content": "x"}\n', 'with a "text" field'),
        ("a.jsonl", "not json\n", "line 1"),
        ("short.txt", "abc", "too few for train and validation sequences"),
        ("empty.txt", "", "Skipped: {'empty': 1}"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path, tokenizer, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as error:
        make(tmp_path, tokenizer, tmp_path / name)
    assert said in str(error.value)
    assert not (tmp_path / "data").exists()


def test_parquet_without_text(tmp_path, tokenizer):
    datasets.Dataset.from_dict({"body": ["x"]}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match='a "text" column is needed'):
        make(tmp_path, tokenizer, tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("source", "spec", "said"),
    [
        ("/nowhere", "sentencepiece:400", "does not exist"),
        ("python-stdlib", "sentencepiece:12", "a size of at least 300"),
        ("python-stdlib", "sentencepiece:many", "a size of at least 300"),
        ("python-stdlib", "no/such-tokenizer", "cannot load the tokenizer"),
        ("hub:no-such-user/no-such-set", "sentencepiece:400", "cannot load the dataset"),
    ],
)
def test_bad_sources_and_tokenizers(tmp_path, source, spec, said):
    with pytest.raises(DataError) as error:
        prepare([source], spec, 16, tmp_path / "data", progress=False)
    assert said in str(error.value)


def test_too_little_text_for_a_large_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text(words(20))
    with pytest.raises(DataError, match="cannot train a tokenizer of 4096 pieces"):
        prepare(
            [str(tmp_path / "a.txt")], "sentencepiece:4096", 16, tmp_path / "data", progress=False
        )


def test_preparing_again_gives_the_same_data_and_replaces_the_old(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(words(3000))
    first = make(tmp_path, tokenizer, tmp_path / "a.txt")
    second = make(tmp_path, tokenizer, tmp_path / "a.txt")
    assert first == second
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".data")] == []


def test_ids_are_stored_as_wide_as_the_tokenizer_needs(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(words(2000))
    make(tmp_path, tokenizer, tmp_path / "a.txt")
    assert (
        datasets.load_from_disk(str(tmp_path / "data"))["train"].features["input_ids"].feature.dtype
        == "uint16"
    )
    wide = AutoTokenizer.from_pretrained(tokenizer)
    wide.add_tokens([f"<extra {i}>" for i in range(70_000)])
    wide.save_pretrained(tmp_path / "wide")
    (tmp_path / "a.txt").write_text(words(2000) + " <extra 69999>" * 40)
    make(tmp_path, str(tmp_path / "wide"), tmp_path / "a.txt")
    data = TokenData(tmp_path / "data")
    largest = max(
        data.sequences(split, range(data.num_sequences(split))).max().item()
        for split in ("train", "validation")
    )
    assert largest == len(wide) - 1 > 2**16
