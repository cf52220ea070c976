"""Benchmarks run, count right and say what they cannot do. Times are tiny here and never judged."""

import json
import re
import subprocess
from datetime import date, datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import check_planner
import pytest
import torch
from ranks import run_ranks

from ds_local.cli import benchmark
from ds_local.errors import DsLocalError
from ds_local.measure import (
    gpu,
    gpu_checks,
    network,
    pictures,
    real,
    real_systems,
    report,
    sleeping,
)
from ds_local.measure.sweep import Setting, sweep
from ds_local.measure.systems import SYSTEMS, choose
from ds_local.measure.tables import gpu_tables

POOL = SimpleNamespace(run=run_ranks)
QUICK = sleeping.Times(0.001, 0.001, 0.001)
CONTRACT = {
    "system",
    "schedule",
    "stages",
    "micro_batches",
    "link",
    "efficiency",
    "step_seconds",
    "peak_live_micro_batches",
}


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["benchmark.py", *map(str, arguments)])
    code = benchmark.main()
    return code, capsys.readouterr()


# --- counting -------------------------------------------------------------------------------------


def test_tables_take_repetitions_of_several_runs_together():
    row = {
        "benchmark": "schedules",
        "command": "c",
        "machine": "m",
        "system": "a",
        "schedule": "b",
        "stages": 2,
        "micro_batches": 4,
    }
    row |= {
        "link": {},
        "efficiency": 0.5,
        "step_seconds": 2.0,
        "repetitions": [2.0],
        "simulated_efficiency": 1.0,
    }
    row |= {"efficiency_lowest": 0.5, "efficiency_highest": 0.5}
    faster = row | {"repetitions": [1.25, 1.0], "efficiency": 0.8, "step_seconds": 1.25}
    assert "| a b | 80.0 (50-100) / 100 |" in report.markdown([row, faster])


def test_rows_say_day_and_commit_and_keep_them(tmp_path, monkeypatch):
    path, row = tmp_path / "rows.json", {"machine": "m", "command": "c", "benchmark": "gpu"}
    monkeypatch.setattr(report, "commit", lambda: "0123456789ab+changes")
    report.save([{"task": "new"}, row], path, "gpu")  # the second as an older file has it
    first, second = report.load([path])
    assert date.fromisoformat(first["date"]) <= datetime.now(timezone.utc).date()
    assert (first["benchmark"], first["commit"]) == ("gpu", "0123456789ab+changes")
    assert second == row
    monkeypatch.setattr(report, "commit", lambda: "another")
    report.save([first, second], path, "gpu")
    assert report.load([path]) == [first, second]
    said = report.markdown([{**first, "what": "tests"} | TESTS, {**row, "what": "tests"} | TESTS])
    assert f", {first['date']}, commit 0123456789ab+changes\n`c` on a m\n" in said


TESTS = {"passed": 1, "failed": 0, "seconds": 2.0}


def git(folder, *words):
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", folder, *who, *words], check=True, capture_output=True)


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "__file__", str(tmp_path / "ds_local" / "measure" / "report.py"))
    asked = report.commit.__wrapped__
    assert asked() is None
    git(tmp_path, "init")
    assert asked() is None  # nothing is in it
    (tmp_path / "a").write_text("a")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "a")
    clean = asked()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "beside").write_text("b")
    assert asked() == clean
    (tmp_path / "a").write_text("b")
    assert asked() == f"{clean}+changes"
    inside = tmp_path / "venv" / "ds_local" / "measure" / "report.py"
    monkeypatch.setattr(report, "__file__", str(inside))
    assert asked() is None  # an installed package, within a checkout of something


# --- runs -----------------------------------------------------------------------------------------


def rows_of(names, times=QUICK, stages=2, micro_batches=4):
    setting = Setting(stages, micro_batches, times, network.Shape())
    return {
        f"{r['system']}:{r['schedule']}": r
        for batch in sweep([setting], choose(names), 1, POOL)
        for r in batch
    }


def test_the_planner_is_held_against_real_engines():
    layouts = [("local", 2, 1, 4, 0.0), ("mixed 1/4", 2, 1, 4, 0.01)]
    rows = check_planner.compare(POOL, layouts, seconds=0.02, steps=5)
    assert [row["predicted"] for row in rows] == pytest.approx([4 * 0.06, 4 * 0.06 + 3 * 0.01])
    assert all(
        row["measured"] > 0.98 * row["predicted"] for row in rows
    )  # nothing is faster than its sleep


def test_every_system_runs_and_gives_the_row_of_the_contract(tmp_path):
    traced, systems = [], [system for system in SYSTEMS if system.head in (0, 0.05)]
    setting = Setting(2, 8, QUICK, network.Shape())
    (rows,) = sweep(
        [setting], systems, 1, POOL, lambda system, setting, results: traced.append(results)
    )
    assert [f"{r['system']}:{r['schedule']}" for r in rows] == [system.name for system in systems]
    assert all(row.keys() >= CONTRACT and 0 < row["efficiency"] <= 1.05 for row in rows)
    live = {
        r["schedule"]: r["peak_live_micro_batches"]
        for r in rows
        if r["system"] in ("ds_local", "torch")
    }
    assert live["local"] == [1, 1]
    assert live["backprop"] == live["1F1B"] == [2, 1]
    assert live["GPipe"] == [8, 8]
    # the lanes of a trace hold all the sleeping there is
    for system, ranks in zip(systems, traced, strict=True):
        assert all(
            sum(what == "forward" for what, *_ in rank["events"]) >= 8 * system.pieces
            for rank in ranks
        )
    report.save(rows, tmp_path / "rows.json", "schedules")
    loaded = report.load([tmp_path / "rows.json"])
    assert "| ds_local local |" in report.markdown(loaded)
    pictures.draw_bars(loaded, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 10_000


def test_what_is_alive_is_what_the_schedule_says():
    times = sleeping.Times(0.001, 0.001, 0.001, 0.0, floats=64 * 64, layers=8, width=64)
    rows = rows_of(
        ["ds_local:local", "ds_local:backprop", "deepspeed:1F1B", "torch:GPipe", "async"], times
    )
    live = {
        name: [int(count) for count in row["peak_live_micro_batches"]]
        for name, row in rows.items()
        if "head" not in name
    }
    assert live == {
        "ds_local:local": [1, 1],
        "ds_local:backprop": [2, 1],
        "deepspeed:1F1B": [2, 1],
        "torch:GPipe": [4, 4],
        "async:1F1B, no flush": [2, 1],
    }
    # four receives posted ahead, of an activation each, and nothing else waits in buffers
    posted = rows["ds_local:local"]["posted_receive_bytes"]
    assert posted[0] == 0
    assert 0 <= posted[1] - 4 * 64 * 64 * 4 < 4 * 1024


def test_a_target_loss_is_reached_between_two_looks():
    curve = [(10, 5.0, 4.0), (20, 11.0, 3.0)]
    assert real.reached(curve, 3.25) == pytest.approx((17.5, 9.5))
    assert real.reached(curve, 2.9) is None
    assert real.reached(curve[:1], 4.5) == (10, 5.0)


def test_real_systems_train_the_same_model():
    model = {
        "model_type": "gpt2",
        "vocab_size": 32,
        "n_positions": 8,
        "n_embd": 16,
        "n_layer": 3,
        "n_head": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    job = real_systems.Job(model, None, 8, 2, 4)
    losses = {
        key: run_ranks(real.until_loss, 2, key, job, 0.0, real.EVAL_EVERY)[0][-1][2]
        for key in real_systems.SYSTEMS
    }
    assert losses["ds_local", "backprop"] == pytest.approx(losses["deepspeed", "1F1B"], rel=1e-5)
    # every replica sees the same repeated batch here, so the mean gradient is that of one
    assert losses["torch", "data parallel"] == pytest.approx(losses["deepspeed", "1F1B"], rel=1e-5)
    assert losses["ds_local", "local"] != pytest.approx(losses["ds_local", "backprop"], rel=1e-5)
    assert min(run_ranks(real.speed, 2, ("ds_local", "local"), job, 1)) > 0


# --- commands -------------------------------------------------------------------------------------


def test_gpu_dry_run_on_the_cpu(tmp_path, monkeypatch, capsys):
    file = tmp_path / "gpu.json"
    parts = ("--parts", "whole", "stages", "heads", "engine")
    few = ("--stages", 4, "--accumulate", 2)
    options = ("--dry-run", "--no-compile", *few, "--json", file, *parts)
    code, said = command(monkeypatch, capsys, "gpu", *options)
    assert code == 0, said.err
    rows = json.loads(file.read_text())
    assert [r["stage"] for r in rows if r["what"] == "stage"] == [0, 1, 2, 3]
    assert sum(r["blocks"] for r in rows if r["what"] == "stage") == 8
    predictions = [r for r in rows if r["what"] == "prediction"]
    assert {r["link"]["name"] for r in predictions} == {
        "NVLink 450 GB/s",
        "100 Gb/s",
        "10 Gb/s",
        "1 Gb/s",
    }
    assert all(0 < r["efficiency"] <= 1 for r in predictions)
    assert "predicted efficiency" in said.out
    assert all(r["dry_run"] and r["date"] and "commit" in r for r in rows)
    heads = [r for r in rows if r["what"] == "head"]
    assert {(r["kernel"], r["block_compiled"]) for r in heads} >= {("torch", False)}


def test_gpu_tests_that_failed_run_again_and_the_command_says_so(tmp_path, monkeypatch, capsys):
    file, answers = tmp_path / "gpu.json", iter([(1, "1 failed, 2 passed"), (0, "3 passed")])

    def run(words, **_):
        code, said = next(answers)
        return subprocess.CompletedProcess(words, code, f"{said} in 1s\n")

    monkeypatch.setattr(gpu_checks, "subprocess", SimpleNamespace(run=run, PIPE=-1))
    options = ("gpu", "--dry-run", "--parts", "tests", "--json", file)
    code, said = command(monkeypatch, capsys, *options)
    assert code == 1
    assert "| 2 passed, 1 failed, dry run |" in said.out
    for _ in range(2):  # the second time nothing is left to do
        code, _ = command(monkeypatch, capsys, *options)
        (row,) = json.loads(file.read_text())
        assert (code, row["passed"], row["failed"]) == (0, 3, 0)


def test_heads_are_timed_beside_a_block_that_is_compiled_as_they_are(monkeypatch):
    arguments = ["gpu", "--dry-run", "--sequences", "1", "--tokens", "8"]
    bench = gpu._Bench(benchmark.parse_arguments(arguments))
    compiled, ready = [], bench.device.ready

    def recorded(module, is_compiled=False):
        compiled.append((type(module).__name__, is_compiled))
        return ready(module)

    monkeypatch.setattr(bench.device, "ready", recorded)
    monkeypatch.setattr(bench.device, "seconds", lambda _: 2.0 if compiled[-1][1] else 6.0)
    rows = {row["head"]: row for row in bench.heads("tiny", bench.config("tiny"))}
    assert bench.args.kernel == "compiled"
    full, checkpointed = rows["full"], rows["full, checkpointed chunks"]
    kept = ("kernel", "block_compiled", "block_seconds", "seconds")
    assert [full[name] for name in kept] == ["compiled", True, 2.0, 2.0]
    assert [checkpointed[name] for name in kept] == ["checkpointed", False, 6.0, 6.0]
    assert compiled.count(("Layers", True)) == compiled.count(("Layers", False)) == 1
    (table,) = gpu_tables([full | {"peak_bytes": None}])
    assert "| tiny: full | 2000.00 | 1.00 | 2000.00 ms, compiled | - |" in table


@pytest.mark.slow
def test_gpu_dry_run_of_the_tests_and_the_study(tmp_path, monkeypatch, capsys):
    file = tmp_path / "gpu.json"
    monkeypatch.chdir(tmp_path)  # data and runs
    code, said = command(
        monkeypatch, capsys, "gpu", "--dry-run", "--parts", "tests", "study", "--json", file
    )
    assert code == 0, said.err
    rows = json.loads(file.read_text())
    (tests,) = (r for r in rows if r["what"] == "tests")
    assert (tests["passed"], tests["failed"]) == (1, 0)
    (study,) = (r for r in rows if r["what"] == "study")
    assert study["method"] == "backprop"
    assert 3 < study["loss"] < 7


def test_heads_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    file = tmp_path / "heads.json"
    code, said = command(
        monkeypatch,
        capsys,
        "heads",
        "--width",
        64,
        "--vocabulary",
        300,
        "--tokens",
        32,
        "--repeats",
        1,
        "--json",
        file,
    )
    assert code == 0, said.err
    rows = {row["head"]: row for row in json.loads(file.read_text())}
    parameters = {head: row["parameters"] for head, row in rows.items()}
    assert parameters["full"] == 300 * 64 + 2 * 64  # readout and norm
    assert parameters["shared readout"] == 2 * 64
    assert parameters["1/8 of the vocabulary"] == (38 + 1) * 64 + 2 * 64
    assert parameters["1/8 of the tokens, companion"] == parameters["full"] + 64 * 64
    assert (rows["full"]["of_full_time"], rows["full"]["of_full_flops"]) == (1, 1)
    assert rows["1/8 of the vocabulary"]["of_full_flops"] == pytest.approx(39 / 300)
    foresees = rows["1/8 of the tokens, companion"]["of_full_flops"]
    assert foresees == pytest.approx(1 / 8 + 64 / 300)
    assert "| shared readout |" in said.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["schedules", "--systems", "megatron"],
            "no system is called 'megatron'; there are ds_local:local",
        ),
        (["gpu"], "needs a CUDA device; --dry-run"),
        (["real", "--target-loss", 3], "--target-loss needs --data"),
        (["table", "/nowhere.json"], "/nowhere.json was not written by --json"),
    ],
)
def test_mistakes_are_said_in_a_sentence(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DsLocalError) as error:  # which `cli.ending` says in a sentence
        command(monkeypatch, capsys, *arguments)
    assert message in str(error.value)


def test_links_are_skipped_with_a_sentence_where_namespaces_are_not_allowed(monkeypatch, capsys):
    monkeypatch.setattr(network, "refusal", lambda: "operation not permitted")
    monkeypatch.delenv(network.INSIDE, raising=False)
    code, said = command(monkeypatch, capsys, "links")
    assert code == 0
    assert "does not allow network namespaces (operation not permitted)" in said.out


def test_documents_name_commands_that_parse():
    text = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    named = [
        line.strip()
        for line in text.splitlines()
        if line.strip().startswith("python scripts/benchmark.py")
    ]
    assert len(named) >= 6
    for line in named:
        benchmark.parse_arguments(line.split("#")[0].split()[2:])
