"""Options of a run beside the plain one: best and last checkpoints, early stopping, a dry run,
epochs, arguments from a file, the loop from a script."""

import json
import math
import re
import signal
from pathlib import Path

import pytest
import torch
from launch import ROOT, finished, fork_server, launch, losses, metrics, start, write_inputs

from ds_local.checkpoints.facts import read_facts

STILL = {
    "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "weight_decay": 0.0, "torch_adam": True}},
    "scheduler": {"type": "WSD", "params": {"total_num_steps": 20}},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def monitored(tmp_path_factory):
    """Inputs of which the runs write csv files too, beside them."""
    folder = tmp_path_factory.mktemp("monitored")
    csv = {"enabled": True, "output_path": str(folder / "csv"), "job_name": "job"}
    return write_inputs(folder, csv_monitor=csv)


@pytest.fixture(scope="module")
def kept(monitored, tmp_path_factory):
    """A run that saves at each second step and keeps two of these, and the best."""
    inputs, folder = monitored, tmp_path_factory.mktemp("kept") / "run"
    every = {"--max-steps": "7", "--eval-every": "2", "--save-every": "2", "--keep-last": "2"}
    result = launch({**inputs, "--output": str(folder), **every}, "--keep-best")
    assert result.returncode == 0, result.stdout
    return folder


def layers(checkpoint):
    paths = sorted(checkpoint.glob("layer_*.pt"))
    return {path.name: torch.load(path, weights_only=True) for path in paths}


def test_the_last_and_the_best_are_kept(kept):
    places = {path.name for path in (kept / "checkpoints").iterdir() if path.is_dir()}
    assert places == {"global_step6", "global_step7", "best", "tokenizer"}
    assert (kept / "checkpoints" / "latest").read_text() == "global_step7"
    told = losses(kept)
    by_loss = min((told["validation", step, 1], step) for step in (2, 4, 6, 7))
    best = kept / "checkpoints" / "best"
    assert read_facts(best)["step"] == by_loss[1]
    if by_loss[1] in (6, 7):
        one, other = layers(best), layers(kept / "checkpoints" / f"global_step{by_loss[1]}")
        assert one.keys() == other.keys()
        assert all(torch.equal(t, other[n][k]) for n, s in one.items() for k, t in s.items())


def test_a_run_goes_on_from_the_latest_not_the_best_and_with_the_same_figures(
    kept, inputs, monitored, tmp_path
):
    """Beside a run without validations before training, saves and removals. The monitors have every
    point once: also those of steps that were taken before a kill and are taken again."""
    plain = tmp_path / "plain"
    row = json.loads((kept / "metrics.jsonl").read_text().splitlines()[-1])
    with (kept / "metrics.jsonl").open("a") as file:  # as if killed in step 8
        file.write(json.dumps({**row, "split": "train", "step": 8}) + "\n")
    resumed = [monitored, kept, "--resume", "--keep-last", "1", "--allow-change", "data"]
    for given, folder, *more in (resumed, [inputs, plain]):
        result = launch({**given, "--output": str(folder), "--max-steps": "9"}, *more)
        assert result.returncode == 0, result.stdout
    train = {key: loss for key, loss in losses(kept).items() if key[0] == "train"}
    assert train == {key: loss for key, loss in losses(plain).items() if key[0] == "train"}
    places = {path.name for path in (kept / "checkpoints").iterdir() if path.is_dir()}
    assert places == {"global_step9", "best", "tokenizer"}
    assert points(monitored, "Train_Samples_train_loss") == [*range(1, 8), 9]
    assert points(monitored, "Validation_stage_1_segment_1_loss") == [0, 2, 4, 6, 7, 9]


def points(inputs, name):
    """The steps of a csv file of 8 samples a step; it has one header."""
    file = Path(inputs["--data"]).parent / "csv" / "job" / f"{name}.csv"
    head, *rows = file.read_text().split()
    assert head == f"step,{name.rpartition('Samples_')[2] if 'Samples' in name else 'loss'}"
    return [int(row.partition(",")[0]) / 8 for row in rows]


def test_a_run_ends_after_validations_without_a_lower_loss(tmp_path):
    """Weights that stand still give the same loss each time. Started again, it is over."""
    inputs = write_inputs(tmp_path, **STILL)
    run = {
        **inputs,
        "--output": str(tmp_path / "run"),
        "--max-steps": "20",
        "--eval-every": "2",
        "--stop-after-worse": "2",
    }
    for more in ((), ("--resume",)):
        result = launch(run, *more)
        assert result.returncode == 0, result.stdout
        told = losses(tmp_path / "run")
        assert [step for split, step, segment in told if (split, segment) == ("validation", 1)] == [
            0,
            2,
            4,
        ]
        ending = (
            "stopped after 2 validations in a row without a lower loss (the best validation loss "
            f"is {told['validation', 0, 1]:.4f}) at step 4; report: "
        )
        assert ending in result.stdout
        assert max(row["step"] for row in metrics(tmp_path / "run")) == 4


def test_a_validation_that_a_stop_left_out_is_made_up_for(inputs, tmp_path):
    """SIGTERM comes in a step that is due for one."""
    words = {**inputs, "--output": str(tmp_path / "run"), "--max-steps": "6", "--eval-every": "2"}
    given = [part for pair in words.items() for part in pair]
    hook = ("stop_in", {"where": "train_batch", "nth": 4, "number": signal.SIGTERM})
    stopped = fork_server().start("train.py", given, 1, hooks={0: [hook]})
    assert "stopped as asked at step 4" in finished(stopped, 180).stdout
    assert launch(words, "--resume", ranks=1).returncode == 0
    told = [step for split, step, segment in losses(tmp_path / "run") if split == "validation"]
    assert sorted(set(told)) == [0, 2, 4, 6]


def test_steps_of_another_size_go_on_where_the_data_was(inputs, tmp_path):
    words = {**inputs, "--output": str(tmp_path / "run")}
    assert launch({**words, "--max-steps": "3"}, ranks=1).returncode == 0
    config = json.loads(Path(inputs["--deepspeed_config"]).read_text())
    config["gradient_accumulation_steps"] *= 2
    words["--deepspeed_config"] = str(tmp_path / "larger.json")
    Path(words["--deepspeed_config"]).write_text(json.dumps(config))
    for steps in ("4", "5"):
        given = {**words, "--max-steps": steps}
        result = launch(given, "--resume", "--allow-change", "batch", ranks=1)
        assert result.returncode == 0, result.stdout
    tokens = {row["step"]: row["tokens"] for row in metrics(tmp_path / "run")}
    of_3 = tokens[3]
    assert tokens == {step: of_3 // 3 * (step + max(0, step - 3)) for step in tokens}
    assert max(tokens) == 5


def test_a_dry_run_tells_time_and_memory_and_writes_nothing(inputs, tmp_path):
    folder = tmp_path / "run"
    arguments = {**inputs, "--output": str(folder), "--max-steps": "100", "--eval-every": "30"}
    result = launch(arguments, "--dry-run")
    assert result.returncode == 0, result.stdout
    assert re.search(
        r"dry run: a step takes [\d.e-]+ s \([\d,]+ tokens/s\), a validation about [\d.e-]+ s; 100 "
        r"steps and 4 validations about \d+:\d\d:\d\d; memory stage 0 \d\.\d\d GiB, stage 1 "
        r"\d\.\d\d GiB; nothing was written",
        result.stdout,
    )
    assert "  scheme        1 x backprop + 3 x local: " in result.stdout
    assert not folder.exists()


def test_a_dry_run_leaves_a_run_as_it_is(kept, inputs):
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    arguments = {**inputs, "--output": str(kept), "--max-steps": "100"}
    refused = launch(arguments, "--dry-run")
    assert refused.returncode != 0
    assert "already holds a run; add --resume" in refused.stdout
    result = launch(arguments, "--dry-run", "--resume")
    assert result.returncode == 0, result.stdout
    assert "resuming at step " in result.stdout
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*")} == before


def test_epochs_and_options_in_a_file(inputs, tmp_path):
    facts = json.loads((Path(inputs["--data"]) / "prepared.json").read_text())
    steps = math.ceil(0.02 * facts["sequences"]["train"] / 8)
    options = {
        **{name.removeprefix("--"): value for name, value in inputs.items()},
        "output": str(tmp_path / "run"),
        "max_steps": 1000,
        "eval-every": 2,
        "resume": True,
    }
    (tmp_path / "run.json").write_text(json.dumps(options))
    result = launch(
        {"--arguments": str(tmp_path / "run.json"), "--epochs": "0.02"}, "--eval-every", "0"
    )
    assert result.returncode == 0, result.stdout
    assert f"finished at step {steps}; report" in result.stdout
    assert {row["step"] for row in metrics(tmp_path / "run")} == {*range(1, steps + 1)}
    arguments = json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]
    assert (arguments["epochs"], arguments["max_steps"]) == (0.02, steps)


def example(inputs, folder, ranks, good_enough):
    script = str(ROOT / "examples" / "callbacks.py")
    words = ["--data", inputs["--data"], "--model", inputs["--model"], "--output", str(folder)]
    return finished(start(script, *words, "--good-enough", good_enough, ranks=ranks), 200)


def test_callbacks_hear_of_all_and_may_end_the_run(inputs, tmp_path):
    result = example(inputs, tmp_path / "run", 2, "100")
    assert result.returncode == 0, result.stdout
    assert "saved good-enough" in result.stdout
    assert "ended at step 0: loss below 100.0" in result.stdout
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "latest").read_text() == "global_step0"
    assert read_facts(checkpoints / "good-enough")["step"] == 0


def test_the_loop_in_a_script_without_a_launcher(inputs, tmp_path):
    result = example(inputs, tmp_path / "run", 1, "0")
    assert result.returncode == 0, result.stdout
    steps = re.findall(r"rank 0, step (\d+): loss of segments \{0: ([\d.]+)\}", result.stdout)
    told = losses(tmp_path / "run")
    assert [int(step) for step, _ in steps] == [*range(1, 13)]
    assert all(
        round(told["train", int(step), 0], 3) == float(loss)
        for step, loss in steps
        if ("train", int(step), 0) in told
    )
    assert re.findall(r"report of step (\d+): 1 segments", result.stdout) == [
        "2",
        "4",
        "6",
        "8",
        "10",
        "12",
    ]
    assert "saved global_step12\n" in result.stdout
    assert "ended at step 12: finished" in result.stdout
    assert f"validation loss {told['validation', 12, 0]:.4f} at step 12" in result.stdout


MISTAKE = """
import sys, ds_local
from callbacks import config

class Mistaken(ds_local.Callback):
    def on_step(self, run):
        if run.step == 2 and run.engine.global_rank == 1:
            raise KeyError("a mistake of the user's")

model, data, output = sys.argv[1:]
ds_local.train(model=model, data=data, output=output, deepspeed_config=config, max_steps=9,
               callbacks=[Mistaken()])
"""


def test_an_exception_of_a_callback_ends_all_ranks_with_its_traceback(inputs, tmp_path):
    path = f"import sys\nsys.path.insert(0, {str(ROOT / 'examples')!r})\n"
    (tmp_path / "script.py").write_text(path + MISTAKE)
    words = [inputs["--model"], inputs["--data"], str(tmp_path / "run")]
    run = start(str(tmp_path / "script.py"), *words, ranks=2)
    try:
        assert run.wait(100), run.outputs()
        assert run.statuses() == [1, 1]
        said = run.outputs()
    finally:
        run.close()
    assert "in on_step" in said
    assert 'KeyError: "a mistake of the user\'s"' in said
    assert "the run ended elsewhere: stage 1 (rank 1): " in said
