"""Scripts before and after a port: few lines differ, and what they compute does not."""

import ast
import difflib
import json
import re
import subprocess
from pathlib import Path

import pytest
from launch import ROOT, finished, start
from launch import losses as losses_of
from samples import sampled

from ds_local.data.corpus import prepare

pytestmark = pytest.mark.timeout(1300)
PORTS = ROOT / "examples" / "ports"
CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 4,
    "steps_per_print": 5,
    "gradient_clipping": 0.0,  # DeepSpeed's default is 1: all of a pipeline by stage 0's norm
    "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 3}},
}


def code_of(name):
    """Lines of a script without its docstring and blank lines."""
    text = (PORTS / name).read_text()
    ends = ast.parse(text).body[0].end_lineno
    return [line for line in text.splitlines()[ends:] if line.strip()]


def changed_lines(before, after):
    """How many lines a person has to write, change or take away."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    return sum(
        max(there - here, new - old)
        for kind, here, there, old, new in matcher.get_opcodes()
        if kind != "equal"
    )


def test_the_pipeline_tutorials_shape_is_ported_in_ten_lines():
    assert changed_lines(["a", "b", "c"], ["a", "x", "y", "c", "d"]) == 3
    assert 5 < changed_lines(code_of("pipeline_before.py"), code_of("pipeline_after.py")) <= 10


def run(script, folder, *words, ranks=2, **config):
    """What a script of the port says."""
    path = folder / "ds_config.json"
    path.write_text(json.dumps({**CONFIG, **config}))
    result = finished(
        start(str(PORTS / script), "--deepspeed_config", str(path), *words, ranks=ranks), 200
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def losses(said):
    return [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", said)]


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """The losses of DeepSpeed's own pipeline, and the folder with its checkpoint."""
    folder = tmp_path_factory.mktemp("before")
    return losses(run("pipeline_before.py", folder, "--save", str(folder / "checkpoints"))), folder


def test_in_backprop_mode_the_losses_are_those_of_deepspeed(before, tmp_path):
    after = losses(run("pipeline_after.py", tmp_path, local_parallel={"mode": "backprop"}))
    assert len(after) == 20
    assert after == pytest.approx(before[0], rel=1e-5)
    assert after[-1] < after[0] / 2


def test_with_losses_of_their_own_the_stages_learn_too(before, tmp_path):
    after = losses(run("pipeline_after.py", tmp_path, local_parallel={"mode": "local"}))
    assert after[0] == pytest.approx(before[0][0], rel=1e-5)
    assert after[-1] < after[0] / 2
    assert after != pytest.approx(before[0], rel=1e-3)


# --- command lines --------------------------------------------------------------------------------

SAY = """#!/bin/sh
{ printf "%s\\t" "$(basename "$0")" "$@"; echo; } >> "$SAID"
"""


def commands_of(script, folder, *words):
    """The commands that a shell script runs, word by word."""
    said = folder / "said"
    for name in ("python", "deepspeed"):
        (folder / name).write_text(SAY)
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "SAID": str(said)}
    done = ["bash", str(PORTS / script), *map(str, words)]
    subprocess.run(done, check=True, timeout=30, env=environment, cwd=ROOT)
    return [line.split("\t")[:-1] for line in said.read_text().splitlines()]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text, and the folder of a tokenizer of 512 tokens."""
    folder, source = tmp_path_factory.mktemp("text"), str(ROOT / "docs" / "runs.md")
    prepare([source], "sentencepiece:512", 64, folder / "data", progress=False)
    return source, folder / "data" / "tokenizer"


@pytest.mark.parametrize("port", sampled(["megatron"], ["run_clm", "megatron"]))
def test_the_commands_after_a_port_run_and_learn(port, text, tmp_path):
    commands = commands_of(f"{port}_after.sh", tmp_path, *text, tmp_path)
    assert [words[0] for words in commands] == ["python", "deepspeed", "python"]
    for program, *words in commands:
        ranks = 1
        if program == "deepspeed":
            option, number, *words = words
            assert option == "--num_gpus"
            ranks = int(number)
        result = finished(start(Path(words[0]).name, *words[1:], ranks=ranks), 600)
        assert result.returncode == 0, result.stdout
    told = losses_of(tmp_path / "run")
    assert told["validation", 20, 1] < told["validation", 0, 1] - 0.3
    model = json.loads((tmp_path / "model" / "config.json").read_text())
    assert model["vocab_size"] == 512
    arguments = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert arguments["local_parallel"]["mode"] == {"run_clm": "local", "megatron": "backprop"}[port]


@pytest.mark.parametrize("port", ["run_clm", "megatron"])
def test_every_option_before_a_port_is_in_the_tables(port, tmp_path):
    (_, *words), *none = commands_of(f"{port}_before.sh", tmp_path, "text", "tokenizer")
    assert not none
    page = (ROOT / "docs" / "migrating.md").read_text()
    options = [word for word in words[words.index("--num_gpus") + 3 :] if word.startswith("--")]
    assert len(options) > 15
    assert not [option for option in options if not re.search(rf"`[^`]*{option}\b", page)]
