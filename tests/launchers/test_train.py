"""scripts/train.py: what a user types, and what comes of it."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from html import escape
from pathlib import Path

import pytest
from launch import ROOT, command, environment, launch, losses, metrics, script, start, write_inputs

from ds_local.checkpoints.run_fields import METRICS, RUN
from ds_local.cli.train import parse_arguments
from ds_local.errors import ConfigError
from ds_local.training.inputs import read_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return write_inputs(
        folder, csv_monitor={"enabled": True, "output_path": str(folder / "csv"), "job_name": "job"}
    )


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A run of 8 steps on two stages."""
    folder = tmp_path_factory.mktemp("run") / "run"
    result = launch(
        {
            **inputs,
            "--output": str(folder),
            "--max-steps": "8",
            "--eval-every": "4",
            "--save-every": "4",
            "--sample-tokens": "3",
        }
    )
    assert result.returncode == 0, result.stdout
    return folder, result.stdout


def test_the_console_shows_losses_throughput_and_a_table(run):
    folder, output = run
    assert "tokens/s" in output
    assert "segment  stage  validation loss" in output
    assert "  scheme        1 x backprop + 3 x local: the last loss trains everything; " in output
    assert "  steps         8 of 8 x 16 tokens: 1,024 tokens, 0.0" in output
    assert re.search(
        r"step 8/8 \| loss [\d.]+ [\d.]+ \| lr 0\.0\d+ \| norm [\d.]+ [\d.]+ \| ", output
    )
    best = [row["loss"] for row in metrics(folder) if row["split"] == "validation"][-1]
    assert f"{best:.3f}, perplexity {math.exp(best):.2f}; the best so far" in output
    assert str(folder / "loss.png") in output
    assert (folder / "loss.png").stat().st_size > 5000
    assert str(folder / "report.html") in output


def test_the_report_is_of_the_whole_run(run):
    page = (run[0] / "report.html").read_text()
    assert "8 steps, 1,024 tokens" in page
    held = {
        row["stage"]: row["memory_bytes"] for row in metrics(run[0]) if row["split"] == "validation"
    }
    assert all(2**26 < held[stage] < 2**40 for stage in (0, 1))
    for stage in (0, 1):
        assert f'<td>{stage}</td><td class="n">{held[stage] / 2**30:.2f}</td>' in page


def test_the_model_writes_after_each_validation(run):
    folder, output = run
    samples = [row for row in metrics(folder) if row["split"] == "sample"]
    assert [(row["step"], row["segment"]) for row in samples] == [(0, 1), (4, 1), (8, 1)]
    page = (folder / "report.html").read_text()
    for row in samples:
        assert row["prompt"]
        assert f"step {row['step']}: ..." in output
        assert f"{escape(row['prompt'])}<b>{escape(row['text'])}</b>" in page


def test_metrics_follow_the_contract(run):
    rows = metrics(run[0])
    assert {row["split"] for row in rows} == {"train", "validation", "sample"}
    for row in rows:
        known = {name for name, field in METRICS.items() if row["split"] in field.splits}
        known -= {"router_loss"}  # of models with experts
        assert row.keys() == known - ({"nonfinite"} if row["split"] != "train" else set())
    train = [row for row in rows if row["split"] == "train"]
    assert [(row["step"], row["segment"], row["stage"]) for row in train] == [
        (s, k, k) for s in range(1, 9) for k in (0, 1)
    ]
    assert all(
        row["loss"] > 0 and row["tokens"] == row["step"] * 8 * 16 and row["seconds"] >= 0
        for row in train
    )
    assert [(row["step"], row["segment"]) for row in rows if row["split"] == "validation"] == [
        (0, 0),
        (0, 1),
        (4, 0),
        (4, 1),
        (8, 0),
        (8, 1),
    ]


def test_run_json_tells_what_ran(run, inputs):
    facts = json.loads((run[0] / "run.json").read_text())
    assert facts.keys() == RUN.keys() - {"gathered"}
    assert all(f"`{name}`" in RUN["layout"] for name in facts["layout"])
    assert facts["config"]["local_parallel"]["mix"][0] == {"mode": "backprop", "micro_batches": 1}
    shares, hosts = facts["layout"].pop("auxiliary_flops"), facts["layout"].pop("hosts")
    (idle,) = facts["layout"].pop("predicted_idle")
    assert idle[1] == 0 < idle[0] < 0.2
    model = json.loads(Path(inputs["--model"]).read_text())
    width, tokens, head = model["n_embd"], model["vocab_size"], facts["layout"]["head_parameters"]
    assert head == [2 * width + width * tokens, 0]  # norm and readout
    assert facts["layout"].pop("head_parameters") == head
    first, second = facts["layout"].pop("parameters")
    positions = model["n_positions"] * width
    assert first - positions == second - 2 * width  # embedding, and norm with readout
    assert facts["layout"] == {
        "stages": 2,
        "replicas": 1,
        "segments": 2,
        "segment_parts": [0, 3, 6],
    }
    assert shares[0][0] > shares[0][1] == 0
    assert list(hosts) == ["stage 0", "stage 1"]
    assert "loss 1" in facts["routes"][0][0]
    assert facts["schedules"][0][1].startswith("stage 0  F0 F1 B1")
    assert facts["data"]["fingerprint"]
    assert facts["versions"]["deepspeed"]


def test_the_monitor_gets_tags_per_stage(run, inputs):
    folder = Path(inputs["--data"]).parent / "csv" / "job"
    names = {path.name for path in folder.iterdir()}
    assert {
        "Train_stage_0_segment_0_loss.csv",
        "Train_stage_1_segment_1_loss.csv",
        "Train_Samples_train_loss.csv",
    } <= names
    rows = (folder / "Train_stage_0_segment_0_loss.csv").read_text().splitlines()
    assert len(rows) >= 9


@pytest.mark.timeout(1300)
def test_a_resume_under_the_deepspeed_launcher_gives_identical_losses_and_sigterm_saves(
    run, inputs, tmp_path
):
    """Begun without a launcher, as the run that it is held against.

    SIGTERM goes to the launcher's process group, as a terminal or a scheduler does; the launcher
    alone would not pass it on.
    """
    folder = tmp_path / "run"
    settings = {
        **inputs,
        "--output": str(folder),
        "--eval-every": "4",
        "--save-every": "4",
        "--sample-tokens": "3",
    }
    first = launch({**settings, "--max-steps": "4"})
    assert first.returncode == 0, first.stdout
    process = subprocess.Popen(
        command({**settings, "--max-steps": "100000"}, "--resume"),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: metrics(folder)[-1]["step"] > 8, 400)
        os.killpg(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=90)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    check_saved_and_resumed(inputs, folder, output)
    found = losses(folder)
    assert {key: loss for key, loss in found.items() if key[1] <= 8} == losses(run[0])
    train = [row for row in metrics(folder) if row["split"] == "train" and row["step"] <= 8]
    seconds = [row["seconds"] for row in train]
    assert len(seconds) == 16
    assert seconds == sorted(seconds)


def test_the_exported_model_has_the_reported_loss_in_plain_transformers(run, inputs, tmp_path):
    folders = []
    for segment, arguments in ((0, ("--segment", "0")), (1, ())):
        folders.append(str(tmp_path / f"model{segment}"))
        result = script("export_hf.py", str(run[0]), "--output", folders[-1], *arguments)
        assert result.returncode == 0, result.stdout
    code = (
        "import sys, datasets, torch\n"
        "from transformers import AutoModelForCausalLM as A, AutoTokenizer as T\n"
        "data, *folders = sys.argv[1:]\n"
        "rows = datasets.load_from_disk(data)['validation'].with_format('numpy')[:]['input_ids']\n"
        "ids = torch.tensor(rows.astype('int64'))\n"
        "for folder in folders:\n"
        "    model = A.from_pretrained(folder); T.from_pretrained(folder)\n"
        "    with torch.no_grad(): print(model(input_ids=ids, labels=ids).loss.item())\n"
        "assert 'ds_local' not in sys.modules\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, inputs["--data"], *folders],
        check=True,
        capture_output=True,
        text=True,
        env=environment(),
    ).stdout.split()
    told = losses(run[0])
    assert [float(loss) for loss in found[-2:]] == [
        pytest.approx(told["validation", 8, segment], abs=1e-4) for segment in (0, 1)
    ]


def test_the_model_generates_text(run):
    result = script("generate.py", str(run[0]), "--prompt", "abc", "--max-new-tokens", "8")
    assert result.returncode == 0, result.stdout
    assert "abc" in result.stdout


def test_a_profile_predicts_and_a_trace_shows_every_stage(inputs, tmp_path):
    folder = tmp_path / "run"
    result = launch({**inputs, "--output": str(folder), "--max-steps": "6"}, "--profile")
    assert result.returncode == 0, result.stdout
    profile = json.loads((folder / "profile.json").read_text())
    assert all(seconds > 0 for part in ("forward", "head") for seconds in profile["costs"][part])
    assert all(seconds > 0 for seconds in profile["measured"]["step_seconds"])
    prepared = json.loads(Path(inputs["--data"], "prepared.json").read_text())
    assert profile["layout"]["seq_len"] == prepared["seq_len"]
    events = [
        event
        for event in json.loads((folder / "trace.json").read_text())["traceEvents"]
        if event["ph"] == "X"
    ]
    assert {event["tid"] for event in events} == {0, 1}
    assert {"ForwardPass", "GradientPass", "OptimizerStep", "SendActivation"} <= {
        event["name"] for event in events
    }
    shown = script(
        "simulate.py",
        "--stages",
        "2",
        "--micro-batches",
        "4",
        "--mode",
        "local",
        "--json",
        "-",
        "--profile",
        str(folder / "profile.json"),
    )
    assert shown.returncode == 0, shown.stdout
    assert json.loads(shown.stdout)["steady_period"] > 0
    assert "as executed, from trace.json" in (folder / "report.html").read_text()


def test_summarize_shows_the_table_again(run):
    result = script("summarize.py", str(run[0]))
    assert result.returncode == 0
    assert "segment  stage  validation loss" in result.stdout


def test_sigterm_to_one_rank_saves_and_leaves_in_time(inputs, tmp_path):
    folder = tmp_path / "run"
    arguments = {**inputs, "--output": str(folder), "--max-steps": "100000"}
    run = start("train.py", *(part for pair in arguments.items() for part in pair), ranks=2)
    try:
        wait_for(lambda: has_trained(folder), 200)
        run.signal(signal.SIGTERM, 1)
        assert run.wait(90), run.outputs()
    finally:
        run.close()
    step = check_saved_and_resumed(inputs, folder, run.outputs())
    assert f"stopped as asked at step {step}" in run.outputs()


def has_trained(folder):
    return (folder / "metrics.jsonl").exists() and len(metrics(folder)) > 10


def check_saved_and_resumed(inputs, folder, output) -> int:
    """The step of the last checkpoint."""
    latest = folder / "checkpoints" / "latest"
    wait_for(latest.exists, 60)
    step = int(latest.read_text().removeprefix("global_step"))
    assert (folder / "checkpoints" / f"global_step{step}" / "ds_local.json").exists(), output
    resumed = launch({**inputs, "--output": str(folder), "--max-steps": str(step + 2)}, "--resume")
    assert resumed.returncode == 0, resumed.stdout
    assert max(row["step"] for row in metrics(folder)) == step + 2
    return step


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--num-stages", "3"), "2 processes cannot be divided into 3 stages"),
        (
            ("--num-stages", "1", "--segments-per-stage", "5"),
            "need at least 5 blocks, the model has 4",
        ),
        (
            ("--mode", "interlocking", "--window", "3"),
            "window is 3 but the model has 2 segments",
        ),
        (("--window", "2"), "need --mode"),
        (
            ("--backprop-micro-batches", "9"),
            "--backprop-micro-batches 9 exceeds gradient_accumulation_steps, which is 4",
        ),
        (("--data", "/nowhere"), "not a complete data folder"),
        (("--model", "/nowhere.json"), "no model config at"),
        (("--deepspeed_config", "/nowhere.json"), "cannot read the DeepSpeed config"),
    ],
)
def test_mistakes_end_the_run_in_a_sentence(inputs, tmp_path, change, said):
    result = launch({**inputs, "--output": str(tmp_path / "run"), "--max-steps": "4"}, *change)
    assert result.returncode != 0
    assert said in result.stdout
    assert result.stdout.count(said) == 1, result.stdout
    assert "Traceback" not in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("vocab_size", 999, "set vocab_size to 320"), ("n_positions", 8, "takes at most 8")],
)
def test_models_and_data_that_do_not_fit(inputs, tmp_path, field, value, said):
    model = json.loads(Path(inputs["--model"]).read_text())
    (tmp_path / "model.json").write_text(json.dumps({**model, field: value}))
    arguments = {
        **inputs,
        "--model": str(tmp_path / "model.json"),
        "--output": str(tmp_path / "run"),
        "--max-steps": "4",
    }
    with pytest.raises(ConfigError, match=said):
        read_inputs(parse_arguments([part for pair in arguments.items() for part in pair]))


def test_a_run_is_never_overwritten(run, inputs):
    before = (run[0] / "metrics.jsonl").read_text()
    result = launch({**inputs, "--output": str(run[0]), "--max-steps": "4"})
    assert result.returncode != 0
    assert "already holds a run; add --resume" in result.stdout
    assert (run[0] / "metrics.jsonl").read_text() == before
