"""The script that measures the preparation of data."""

import json
import sys

import measure_data
import pytest


def test_a_corpus_of_a_size_is_made_of_python_files(tmp_path):
    path = tmp_path / "a.jsonl"
    measure_data.write_corpus(path, 300_000)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert 300_000 <= path.stat().st_size < 1_000_000
    assert any("import" in text for text in texts)


def test_time_and_memory_of_a_command_and_its_children(tmp_path):
    child = "import time; x = bytearray(60_000_000); time.sleep(1)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    seconds, cpu, held, with_files = measure_data.measure([sys.executable, "-c", code])
    assert seconds > 1
    assert cpu > 0.01
    assert 60e6 < held < with_files < 250e6


def test_a_command_that_fails_is_told():
    with pytest.raises(SystemExit, match=r"failed: .*broken"):
        measure_data.measure([sys.executable, "-c", "raise SystemExit('broken')"])
