"""From files of all kinds to a data folder: what is no text is counted or refused, never guessed
at."""

import json
import os
import shutil
import signal

import datasets
import numpy as np
import pytest
from commands import command
from killed import in_child
from samples import sampled
from sentences import one_sentence
from small_disks import small_disk
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ds_local.data.corpus import prepare
from ds_local.data.dataset import TokenData
from ds_local.data.documents import Reading
from ds_local.data.mixture import Mixture
from ds_local.data.sources import documents
from ds_local.errors import DataError
from ds_local.outputs.storage import size_of


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
    names = [d.name for d in documents([str(tmp_path / "corpus")])]
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
    first = next(d for d in documents([str(folder)], Reading()) if d.name.startswith("bom"))
    assert not first.text.startswith("\ufeff")


@pytest.mark.parametrize(
    "name", sampled([f"{n}.txt" for n in range(15)], [f"{n}.txt" for n in range(60)])
)
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
        ("empty.txt", "", "hold no text; left out: 1 empty (empty.txt)"),
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
    with pytest.raises(DataError, match="has the columns body; name the one with text"):
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


def test_long_lines_alone_train_no_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text(words(3000))
    with one_sentence("no line of less than 4096 characters", error=DataError):
        prepare([str(tmp_path / "a.txt")], "sentencepiece:300", 16, tmp_path / "data")


def test_a_bad_line_is_named_while_a_tokenizer_is_trained(tmp_path):
    lines = [json.dumps({"text": words(20, seed)}) for seed in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{"]))
    with one_sentence("/a.jsonl, line 51 is no JSON", error=DataError):
        prepare([str(tmp_path / "a.jsonl")], "sentencepiece:300", 16, tmp_path / "data")


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
    names = ["</s>", *(f"w{number}" for number in range(70_000))]
    wide = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}))
    wide.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=wide, eos_token="</s>").save_pretrained(
        tmp_path / "wide"
    )
    (tmp_path / "a.txt").write_text("w1 w2 w69999 " * 400)
    make(tmp_path, str(tmp_path / "wide"), tmp_path / "a.txt")
    data = TokenData(tmp_path / "data")
    largest = max(
        data.sequences(split, range(data.num_sequences(split))).max().item()
        for split in ("train", "validation")
    )
    assert largest == 70_000


# --- where to


PLACES = {
    "unrelated files": (
        lambda p: p.mkdir() or (p / "thesis.tex").write_text("x"),
        "is no data folder",
    ),
    "a file": (lambda p: p.write_text("x"), "is not a folder"),
    "a link": (lambda p: p.symlink_to("/usr"), "is a symbolic link"),
    "another set": (
        lambda p: datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(p),
        "is no data folder",
    ),
    "sets": (lambda p: (p / "python" / "train").mkdir(parents=True), "is no data folder"),
}


@pytest.mark.parametrize("what", PLACES)
def test_an_output_that_is_not_ours_is_left_alone(tmp_path, tokenizer, what):
    (tmp_path / "a.txt").write_text(words(300))
    build, said = PLACES[what]
    build(tmp_path / "data")
    before = sorted(os.walk(tmp_path))
    with one_sentence(f"{tmp_path}/data", said, "is left alone", error=DataError):
        make(tmp_path, tokenizer, tmp_path / "a.txt")
    assert sorted(os.walk(tmp_path)) == before


@pytest.mark.parametrize("source", ["data", "data/a.txt", "data/deep", ".", "link", "data/../data"])
def test_sources_and_output_lie_apart(tmp_path, tokenizer, source):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt"):
        (tmp_path / "data" / name).write_text(words(300))
    (tmp_path / "link").symlink_to("data")
    before = sorted(os.walk(tmp_path))
    with one_sentence(f"{tmp_path}/data", "are in one another", error=DataError):
        make(tmp_path, tokenizer, f"{tmp_path}/{source}")
    assert sorted(os.walk(tmp_path)) == before


def test_files_added_to_a_data_folder_are_kept(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(words(300))
    make(tmp_path, tokenizer, tmp_path / "a.txt")
    (tmp_path / "data" / "notes.md").write_text("mine")
    with one_sentence("holds notes.md, which we did not write"):
        make(tmp_path, tokenizer, tmp_path / "a.txt")
    assert (tmp_path / "data" / "notes.md").read_text() == "mine"
    TokenData(tmp_path / "data")  # it does no harm there


def test_a_tokenizer_of_the_folder_that_is_replaced(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(words(300))
    make(tmp_path, tokenizer, tmp_path / "a.txt")
    own = str(tmp_path / "data" / "tokenizer")
    assert make(tmp_path, own, tmp_path / "a.txt", seq_len=8)["seq_len"] == 8


def test_a_full_disk_while_preparing(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(words(20_000))
    (tmp_path / "few.txt").write_text(words(300))
    make(tmp_path, tokenizer, tmp_path / "a.txt")
    whole = size_of(tmp_path / "data") // 1024
    with small_disk(tmp_path / "disk", f"size={whole * 3 // 2}k") as disk:
        facts = prepare([str(tmp_path / "few.txt")], tokenizer, 16, disk / "data", progress=False)
        for place in ("data", "new"):
            with one_sentence(f"cannot write {disk}/{place}", "no space left", "bytes free"):
                prepare([str(tmp_path / "a.txt")], tokenizer, 16, disk / place, progress=False)
        assert [path.name for path in disk.iterdir()] == ["data"]
        assert TokenData(disk / "data").facts == facts
    for options in (
        "size=8k",
        "size=80k",
        f"size={whole}k",
        "size=4m,nr_inodes=6",
        "size=4m,nr_inodes=14",
    ):
        with small_disk(tmp_path / options, options) as disk:
            with one_sentence(f"cannot write {disk}/data", "no space left", error=DataError):
                prepare([str(tmp_path / "a.txt")], tokenizer, 16, disk / "data", progress=False)
            assert list(disk.iterdir()) == []


# --- numbers and tokenizers


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"seq_len": 0}, "--seq-len is 0; give from 2"),
        ({"seq_len": -128}, "--seq-len is -128"),
        ({"seq_len": 1}, "--seq-len is 1"),
        ({"seq_len": 10**12}, "--seq-len is 1000000000000"),
        ({"seq_len": 100_000}, "too few for train and validation sequences of 100000"),
        ({"validation_share": float("nan")}, "--validation-share is nan"),
        ({"validation_share": -1.0}, "--validation-share is -1.0"),
        ({"validation_share": 2.0}, "--validation-share is 2.0"),
        ({"validation_share": 1.0}, "--validation-share is 1.0"),
        ({"validation_share": float("inf")}, "--validation-share is inf"),
        ({"tokenizer_spec": "sentencepiece"}, "give sentencepiece:SIZE"),
        ({"tokenizer_spec": "sentencepiece:-5"}, "give sentencepiece:SIZE"),
        ({"tokenizer_spec": "sentencepiece:\u00b2"}, "give sentencepiece:SIZE"),
        ({"tokenizer_spec": "sentencepiece:" + "9" * 30}, "give sentencepiece:SIZE"),
        ({"tokenizer_spec": "sentencepiece:900000"}, "cannot train a tokenizer of 900000 pieces"),
        ({"tokenizer_spec": ""}, "cannot load the tokenizer ''"),
        ({"tokenizer_spec": "."}, "cannot load the tokenizer '.'"),
    ],
    ids=str,
)
def test_numbers_and_tokenizers_that_make_no_sense(tmp_path, tokenizer, how, said):
    (tmp_path / "a.txt").write_text(words(300))
    settings = {"tokenizer_spec": tokenizer, "seq_len": 16, "progress": False} | how
    with one_sentence(said, error=DataError):
        prepare([str(tmp_path / "a.txt")], output=tmp_path / "data", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def no_end(folder):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.save_pretrained(folder)


def only_spaces(folder):
    """A tokenizer that drops all letters."""
    bare = Tokenizer(models.WordLevel({"</s>": 0, "1": 1}))
    bare.normalizer = normalizers.Replace(Regex("[^0-9]"), "")
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>").save_pretrained(folder)


def letters_alone(folder):
    """A tokenizer that stops at what it does not know."""
    bare = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}))
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>").save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: (p / "tokenizer.json").write_text("{"), "cannot load the tokenizer"),
        (lambda p: (p / "tokenizer.json").write_text('{"model": 3}'), "cannot load the tokenizer"),
        (lambda p: [one.unlink() for one in p.iterdir()], "cannot load the tokenizer"),
        (no_end, "has no end-of-text token"),
        (only_spaces, "gives no tokens for this text"),
        (letters_alone, "cannot take "),
    ],
)
def test_damaged_tokenizers(tmp_path, tokenizer, change, said):
    (tmp_path / "a.txt").write_text(words(300))
    copy = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    change(copy)
    with one_sentence(str(copy), said, error=DataError):
        make(tmp_path, str(copy), tmp_path / "a.txt")


def test_a_piece_without_tokens(tmp_path):
    """A document of which the tokenizer drops a whole piece."""
    only_spaces(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("x" * 250_000 + "1" + "x" * 10)
    for number in range(40):
        (tmp_path / f"b{number}.txt").write_text("1")
    sources = sorted(tmp_path.glob("*.txt"))
    facts = make(tmp_path, str(tmp_path / "tokenizer"), *sources, seq_len=4)
    assert facts["documents"] == 41
    assert facts["tokens"] == 41 + 41
    assert sum(facts["sequences"].values()) == 20


# --- as a command


def test_the_command_says_what_it_left_out_and_what_it_refuses(tmp_path, tokenizer):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text(words(3000))
    (folder / "b.txt").write_text("")
    (folder / "c.xls").write_text("a,b\n")
    common = ["--source", str(folder), "--tokenizer", tokenizer, "--seq-len", "16"]
    output = ["--output", str(tmp_path / "data")]
    refused = command("prepare", *common, *output)
    assert refused.returncode == 1
    assert refused.stderr == (
        f"DataError: {folder}/c.xls is a table; write its text column as .jsonl, .csv or "
        ".parquet, or leave it out with --skip '*.xls'\n"
    )
    done = command("prepare", *common, "--skip", "*.xls", *output)
    assert done.returncode == 0
    assert "left out: 1 left out by --skip (c.xls), 1 empty (b.txt)\n" in done.stdout


def test_a_killed_preparation_leaves_the_old_data_whole(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.txt").write_text(words(3000))
    facts = make(tmp_path, tokenizer, tmp_path / "a.txt")
    monkeypatch.setattr(Mixture, "add", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    killed = in_child(lambda: make(tmp_path, tokenizer, tmp_path / "a.txt"))
    monkeypatch.undo()
    assert killed == -signal.SIGKILL
    assert TokenData(tmp_path / "data").facts == facts
    assert len(list(tmp_path.glob(".data.*"))) == 1
    assert make(tmp_path, tokenizer, tmp_path / "a.txt") == facts
    assert not list(tmp_path.glob(".data.*"))
