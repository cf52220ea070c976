"""Whole runs, from text to a Hugging Face folder: from pretrained weights under accelerate, with
replicas that train apart, and one that diverges."""

import json
import math
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from launch import ROOT, environment, launch, losses, metrics, script, write_inputs
from reference import MODELS
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_local.checkpoints import hf_export as hf
from ds_local.data.tokenizers import check_same_tokenizer
from ds_local.errors import DataError
from ds_local.model import families
from ds_local.outputs.checkpoint_names import HEAD_FILE

# --- from pretrained weights ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """A pretrained folder, and a run of two steps from it under accelerate with a learning rate of
    zero."""
    folder = tmp_path_factory.mktemp("fine-tuned")
    still = {
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 0.0, "weight_decay": 0.0, "torch_adam": True},
        }
    }
    inputs = write_inputs(
        folder, **still, scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 0.0}}
    )
    torch.manual_seed(5)
    fields = json.loads(Path(inputs["--model"]).read_text())
    model = AutoModelForCausalLM.from_config(
        families.load_model_config(fields | {"initializer_range": 0.2})
    )
    model.save_pretrained(folder / "pretrained", max_shard_size="30KB")
    AutoTokenizer.from_pretrained(folder / "data" / "tokenizer").save_pretrained(
        folder / "pretrained"
    )
    arguments = {
        **inputs,
        "--model": str(folder / "pretrained"),
        "--output": str(folder / "run"),
        "--max-steps": "2",
    }
    result = launch(arguments, launcher="accelerate", timeout=280)
    assert result.returncode == 0, result.stdout
    return folder, model, inputs


def test_accelerate_starts_a_run_from_pretrained_weights(fine_tuned):
    folder, model, _ = fine_tuned
    assert json.loads((folder / "run" / "run.json").read_text())["layout"]["stages"] == 2
    out = hf.export(folder / "run", folder / "out")
    back = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items())
    card = (out / "README.md").read_text()
    assert "started from the weights of pretrained" in card
    assert f"{losses(folder / 'run')['validation', 2, 1]:.4f}" in card
    assert str(folder) not in card


ALONE = """
import contextlib, io, json, runpy, sys
sys.modules["deepspeed"] = None
sys.path.insert(0, "scripts")
said = []
for script, *arguments in json.loads(sys.argv[1]):
    sys.argv = [script, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code
    said.append(out.getvalue())
print(json.dumps(said))
"""


def test_every_exit_evaluates_to_the_runs_losses_without_deepspeed(fine_tuned):
    folder, _, inputs = fine_tuned
    exits, figures = str(folder / "exits"), folder / "figures.json"
    text = ["--temperature", "0", "--prompt", "abc", "--max-new-tokens", "6"]
    commands = [
        ["scripts/export_hf.py", str(folder / "run"), "--output", exits, "--all-segments"],
        ["scripts/evaluate.py", exits, "--data", inputs["--data"], "--json", str(figures)],
        ["scripts/generate.py", exits, "--assistant", "0", *text],
        ["scripts/generate.py", exits, *text],
    ]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(commands)],
        check=False,
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *_, drafted, plain = json.loads(done.stdout.splitlines()[-1])
    rows = json.loads(figures.read_text())
    assert set(rows) == {"0", "1"}
    for segment, row in rows.items():
        assert row["loss"] == pytest.approx(
            losses(folder / "run")["validation", 2, int(segment)], abs=1e-4
        )
        assert 0.5 < row["bits_per_byte"] < 20
    assert plain.startswith("abc")
    assert drafted.startswith(plain.rstrip("\n"))
    assert "drafted tokens accepted" in drafted


def test_a_pretrained_model_needs_its_own_tokenizer(fine_tuned):
    folder, *_ = fine_tuned
    assert check_same_tokenizer(folder / "pretrained", folder / "data" / "tokenizer")
    other = AutoTokenizer.from_pretrained(folder / "data" / "tokenizer")
    other.add_tokens(["<one more>"])
    other.save_pretrained(folder / "other")
    with pytest.raises(
        DataError, match=r"has another tokenizer .* prepare the data with --tokenizer"
    ):
        check_same_tokenizer(folder / "other", folder / "data" / "tokenizer")


# --- replicas -------------------------------------------------------------------------------------


def test_two_stages_of_two_replicas_train_resume_and_export(tmp_path):
    replicas = {"sync": "subnets", "every": 3, "scale": "eval"}
    inputs = write_inputs(
        tmp_path, local_parallel={"mode": "local", "num_stages": 2, "replicas": replicas}
    )
    run = {**inputs, "--output": str(tmp_path / "run")}
    for steps, resumed in ((4, ()), (8, ("--resume",))):
        result = launch({**run, "--max-steps": str(steps)}, *resumed, ranks=4)
        assert result.returncode == 0, result.stdout
    exchanged = [
        row["exchanged_bytes"]
        for row in metrics(tmp_path / "run")
        if row["split"] == "train" and row["segment"] == 0
    ]
    assert [amount > 0 for amount in exchanged] == [
        False,
        False,
        True,
        False,
        False,
        True,
        False,
        False,
    ]
    result = script("export_hf.py", str(tmp_path / "run"), "--output", str(tmp_path / "model"))
    assert result.returncode == 0, result.stdout

    ids = torch.tensor(
        datasets.load_from_disk(inputs["--data"])["validation"]
        .with_format("numpy")[:]["input_ids"]
        .astype("int64")
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.n_head == MODELS["gpt2"]["n_head"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss == pytest.approx(losses(tmp_path / "run")["validation", 8, 1], abs=1e-4)


def test_heads_count_the_tokens_of_the_runs_data(tmp_path):
    """And foresee the next one's shallow state; profiled, resumed, exported without these heads."""
    head = {"vocabulary": 40, "token_fraction": 0.5, "companion": 0.5}
    inputs = write_inputs(tmp_path, local_parallel={"mode": "local", "num_stages": 2, "head": head})
    folder = tmp_path / "run"
    run = {**inputs, "--output": str(folder)}
    for steps, how in ((4, "--profile"), (8, "--resume")):
        result = launch({**run, "--max-steps": str(steps)}, how)
        assert result.returncode == 0, result.stdout
    told = losses(folder)["validation", 8, 0]
    assert 0 < told < math.log(41) + 0.1  # over 41 classes, without the companion's
    state = folder / "checkpoints" / "global_step8" / HEAD_FILE.format(0)
    class_of = torch.load(state, weights_only=True)["frequent.class_of"]
    ids = datasets.load_from_disk(inputs["--data"])["train"].with_format("numpy")[:]["input_ids"]
    counts = torch.bincount(torch.from_numpy(ids.astype("int64")).flatten(), minlength=320)
    kept = (class_of < 40).nonzero().flatten()
    assert len(kept) == 40
    assert counts[kept].min() >= counts[class_of == 40].max()
    result = script("export_hf.py", str(folder), "--output", str(tmp_path / "model"), "--heads")
    assert result.returncode == 0, result.stdout
    exit_0 = ("--output", str(tmp_path / "exit"), "--segment", "0")
    result = script("export_hf.py", str(folder), *exit_0)
    assert result.returncode != 0
    assert "tells 40 tokens apart and has one class for all others" in result.stdout


# --- another layout, asynchronous saves -----------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_moves_and_saves_beside_training_ends_as_one_that_does_neither(tmp_path):
    """2 stages, then 4, then 1: `--resume` is all that it takes."""
    inputs = write_inputs(tmp_path, local_parallel={"mode": "local"})
    config = json.loads(Path(inputs["--deepspeed_config"]).read_text())
    config["local_parallel"]["async_save"] = True
    (tmp_path / "beside.json").write_text(json.dumps(config))
    keep = {"--save-every": "2", "--keep-last": "1"}
    moves = {**inputs, "--deepspeed_config": str(tmp_path / "beside.json"), **keep}
    for steps, stages in ((3, 2), (4, 4), (6, 1)):
        layout = {"--max-steps": str(steps), "--segments-per-stage": str(4 // stages)}
        run = {**moves, **layout, "--output": str(tmp_path / "moves")}
        result = launch(run, "--resume", "--keep-best", ranks=stages)
        assert result.returncode == 0, result.stdout
        before = {2: "", 4: "; another layout: stages 2, now 4; ", 1: "stages 4, now 1; "}[stages]
        assert before in result.stdout
    stays = {**inputs, **keep, "--max-steps": "6", "--segments-per-stage": "2"}
    result = launch({**stays, "--output": str(tmp_path / "stays")}, "--keep-best")
    assert result.returncode == 0, result.stdout
    folders = [tmp_path / "moves", tmp_path / "stays"]
    trained = [
        {at: loss for at, loss in losses(folder).items() if at[0] == "train"} for folder in folders
    ]
    kept = [sorted(p.name for p in (folder / "checkpoints").iterdir()) for folder in folders]
    assert trained[0] == trained[1]
    assert kept[0] == kept[1]
    assert "global_step6" in kept[0]
    assert "global_step4" not in kept[0]
    facts = json.loads((tmp_path / "moves" / "run.json").read_text())
    assert [start["step"] for start in facts["starts"]] == [0, 3, 4]
    assert facts["layout"]["stages"] == 1


# --- a run that diverges --------------------------------------------------------------------------


def test_a_run_that_diverges_ends_and_says_so(tmp_path):
    """A learning rate of 1e25: the second step overflows."""
    inputs = write_inputs(
        tmp_path,
        optimizer={"type": "AdamW", "params": {"lr": 1e25, "torch_adam": True}},
        scheduler={
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 1e25, "warmup_max_lr": 1e25, "warmup_num_steps": 2},
        },
        local_parallel={"mode": "interlocking", "on_nonfinite": {"skip": 3}},
    )
    result = launch(
        {**inputs, "--output": str(tmp_path / "run"), "--max-steps": "20", "--save-every": "1"}
    )
    assert result.returncode != 0
    said = "the activation of segment 0 was not finite in step {}"
    assert said.format("4 on stage 0, the 3rd time in a row") in result.stdout, result.stdout
    assert f"step 2, stage 0: {said.format(2).partition(' in step')[0]}" in result.stdout
    assert "Traceback" not in result.stdout

    def refuse(word):
        raise AssertionError(f"{word} in metrics.jsonl")

    rows = [
        json.loads(line, parse_constant=refuse)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    events = {
        (r["step"], r["segment"]): (r["nonfinite"], r["skipped"])
        for r in rows
        if r["nonfinite_step"]
    }
    assert events[4, 0] == ("activation", 3)
    assert events[2, 0] == ("activation", 1)
    assert events[2, 1] == ("from_below", 1)
    train = [row for row in rows if row["split"] == "train"]
    assert all(
        row["loss"] is None and row["has_loss"] is (row["segment"] == 1)
        for row in train
        if row["step"] > 1 or row["segment"] == 0
    )
    latest = (tmp_path / "run" / "checkpoints" / "latest").read_text()
    for path in (tmp_path / "run" / "checkpoints" / latest).glob("layer_*.pt"):
        import torch

        assert all(t.isfinite().all() for t in torch.load(path, weights_only=True).values())
