"""Bad settings through the launchers and without one, and scripts/train.py as one process."""

import json
import os
from pathlib import Path

import psutil
import pytest
from launch import launch, metrics, script, write_inputs
from sentences import assert_one_sentence

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ADAM = {"type": "AdamW", "params": {"torch_adam": True}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def changed(inputs, folder, **settings):
    """The same arguments with another config file."""
    config = json.loads(Path(inputs["--deepspeed_config"]).read_text())
    path = folder / "ds_config.json"
    path.write_text(json.dumps({**config, **settings}))
    return {**inputs, "--deepspeed_config": str(path), "--output": str(folder / "run")}


def left_behind(output):
    """Processes that still run this job."""
    running = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    return [words for words in running if output in words]


@pytest.mark.parametrize(
    ("settings", "arguments", "said", "how"),
    [
        (
            {"optimizer": {**ADAM, "params": {"lr": "1e-3"}}},
            ["--max-steps", "3"],
            "ConfigError: optimizer.params.lr must be a number, got '1e-3'; remove the quotes",
            {},
        ),
        pytest.param(
            {"optimizer": {**ADAM, "params": {"lr": "1e-3"}}},
            ["--max-steps", "3"],
            "ConfigError: optimizer.params.lr must be a number, got '1e-3'; remove the quotes",
            {"launcher": "deepspeed"},
            marks=pytest.mark.slow,  # as under torchrun
        ),
        (
            {},
            ["--max-steps", "-3"],
            "train.py: argument --max-steps: must be an integer of at least 1, got '-3'",
            {"launcher": "torchrun"},
        ),
        (
            {"scheduler": {"type": "WarmupLR", "parms": {}}},
            ["--max-steps", "3"],
            "ConfigError: scheduler.parms is not a key DeepSpeed knows; did you mean 'params'?",
            {},
        ),
        (
            {"gradient_accumulation_steps": 10**12},
            ["--max-steps", "3"],
            "forwards to plan, more than",
            {},
        ),
        (
            {"wandb": {"enabled": True}},
            ["--max-steps", "3"],
            "ConfigError: wandb.enabled needs the package wandb",
            {},
        ),
    ],
)
def test_a_bad_setting_is_said_once_and_nothing_stays(
    inputs, tmp_path, settings, arguments, said, how
):
    given = changed(inputs, tmp_path, **settings)
    result = launch(given, *arguments, **how)
    assert result.returncode != 0
    (line,) = [line for line in result.stdout.splitlines() if said in line]
    assert_one_sentence(line[line.index(said) :], said)
    assert "Traceback" not in result.stdout.split(said)[0]
    assert not (tmp_path / "run").exists()
    assert not left_behind(given["--output"])


def test_train_without_a_launcher_is_one_process(inputs, tmp_path, monkeypatch):
    for key in LAUNCHERS:
        monkeypatch.delenv(key, raising=False)
    given = {**inputs, "--output": str(tmp_path / "run"), "--max-steps": "2"}
    result = script("train.py", *(word for pair in given.items() for word in pair))
    assert result.returncode == 0, result.stdout
    assert "on 1 segment local is the same as backprop" in result.stdout
    rows = metrics(tmp_path / "run")
    assert {(row["segment"], row["stage"]) for row in rows} == {(0, 0)}
    assert "RANK" not in os.environ
