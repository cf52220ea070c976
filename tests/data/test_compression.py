"""Compressed files are read as what is inside; damaged ones are named."""

import bz2
import gzip
import lzma
from pathlib import Path

import pytest
from sentences import one_sentence
from test_corpus import words
from test_readers import zstd

from ds_local.data.compression import Input, endings
from ds_local.errors import DataError

PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
TEXT = words(20_000).encode()


@pytest.mark.parametrize("packed", ["", *PACK])
def test_what_is_inside_is_read_again_and_again(tmp_path, packed):
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(PACK.get(packed, bytes)(TEXT))
    file = Input(path)
    assert file.bytes_read == 0
    for _ in range(2):
        with file.open() as stream:
            assert stream.read(10) == TEXT[:10]
            assert 0 < file.bytes_read <= file.size
            assert stream.read() == TEXT[10:]
            assert file.bytes_read == file.size


DAMAGES = {
    "half": lambda b: b[: len(b) // 2],
    "a byte less": lambda b: b[:-1],
    "3 bytes": lambda b: b[:3],
    "words": lambda b: b"some words",
    "changed": lambda b: b[: len(b) // 2] + b"x" * 16 + b[len(b) // 2 + 16 :],
    "more behind": lambda b: b + b"more and more",
}
UNNOTICED = {("changed", ".zst")}  # these frames have no checksum


@pytest.mark.parametrize(
    ("damage", "packed"),
    [
        (damage, packed)
        for damage in DAMAGES
        for packed in PACK
        if (damage, packed) not in UNNOTICED
    ],
)
def test_damaged_files_are_named(tmp_path, damage, packed):
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(DAMAGES[damage](PACK[packed](TEXT)))
    said = one_sentence(f"{path} is no {packed} file, damaged or cut off", error=DataError)
    with said, Input(path).open() as stream:
        while stream.read(1000):
            pass


@pytest.mark.parametrize("packed", PACK)
def test_streams_one_behind_the_other(tmp_path, packed):
    path = tmp_path / f"a.txt{packed}"
    first, second = PACK[packed](TEXT[:9999]), PACK[packed](TEXT[9999:])
    path.write_bytes(first + second)
    with Input(path).open() as stream:
        assert stream.read() == TEXT
    for damaged in (first + b"?" + second[1:], first + second[:-1], first + second[:1]):
        path.write_bytes(damaged)
        said = one_sentence(f"{path} is no {packed} file, damaged or cut off", error=DataError)
        with said, Input(path).open() as stream:
            stream.read()


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz"])
def test_zeros_behind_a_stream(tmp_path, packed):
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(PACK[packed](TEXT) + bytes(512))
    with Input(path).open() as stream:
        assert stream.read() == TEXT


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.jsonl.gz", (".jsonl", ".gz")),
        ("a.JSONL.GZ", (".jsonl", ".gz")),
        ("a.b.txt", (".txt", "")),
        ("a", ("", "")),
        ("a.zst", ("", ".zst")),
        ("a.tar.xz", (".tar", ".xz")),
    ],
)
def test_two_endings(name, found):
    assert endings(Path("folder.gz") / name) == found
