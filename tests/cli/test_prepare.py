"""`prepare`: what it says of the data folder it made."""

import json

import pytest
from commands import command
from sentences import assert_one_sentence
from test_corpus import words


def test_a_folder_is_made_and_counted(tmp_path):
    texts, data = tmp_path / "texts", tmp_path / "data"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(words(200, number))
    (texts / "empty.txt").write_text("\n")
    (texts / "left.csv").write_text("a,b\n")
    result = command(
        *("prepare", "--source", texts, "--tokenizer", "sentencepiece:300"),
        *("--seq-len", 16, "--validation-share", 0.1, "--skip", "*.csv", "--output", data),
    )
    assert result.returncode == 0, result.stderr
    facts = json.loads((data / "prepared.json").read_text())
    counts = ", ".join(f"{number:,} {split}" for split, number in facts["sequences"].items())
    assert result.stdout.splitlines()[0] == (
        f"20 documents, {facts['tokens']:,} tokens -> {counts} sequences of 16 in {data}"
    )
    assert "1 empty (empty.txt)" in result.stdout
    assert facts["seq_len"] == 16


@pytest.mark.parametrize(("option", "value"), [("--seq-len", "1"), ("--validation-share", "-0.1")])
def test_numbers_that_make_no_data_are_refused(option, value, tmp_path):
    result = command("prepare", "--output", tmp_path / "data", option, value)
    assert result.returncode == 2
    assert f"argument {option}" in result.stderr
    assert not (tmp_path / "data").exists()


def test_an_output_whose_name_is_no_utf8_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text(words(200, 1))
    output = tmp_path / "data\udcff"
    result = command("prepare", "--source", tmp_path / "text.txt", "--output", output)
    assert result.returncode == 1
    assert_one_sentence(result.stderr.strip(), "has bytes that are no UTF-8")
    assert not output.exists()
