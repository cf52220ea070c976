"""What a start may go on with, and what is kept of every start."""

import json
import shutil

import pytest
from killed import killed_everywhere
from small_disks import small_disk
from test_folder import save

from ds_local.config.changes import CHANGES
from ds_local.errors import CheckpointError, DataError, RunError
from ds_local.training.run_folder import RunFolder, tokenizer_test

MODEL = {"n_embd": 32, "resid_pdrop": 0.1, "transformers_version": "5"}
DATA = {"folder": "d", "fingerprint": "a" * 64, "seq_len": 16}
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "local_parallel": {"mode": "local", "seed": 5, "link": {"depth": 4}},
}


def facts(**change):
    found = {
        "arguments": {"max_steps": 8},
        "config": CONFIG,
        "model": MODEL,
        "data": DATA,
        "layout": {"replicas": 1},
        "weights": "gpt2",
        "versions": {"torch": "2"},
        "machine": {},
    }
    return {**found, **change}


def config(**change):
    return {**CONFIG, **change}


def section(**change):
    return config(local_parallel={**CONFIG["local_parallel"], **change})


def start(run, what, step, tag):
    run.start(what, step, tag, run.path.parent / "tokenizer")


@pytest.fixture
def said():
    return []


@pytest.fixture
def run(tmp_path, said):
    """A run that was started at step 0 and saved at step 4."""
    run = RunFolder(tmp_path / "run", said.append)
    assert run.begins_at(resume=False) is None
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    start(run, facts(), 0, None)
    save(run.checkpoints, "global_step4", 4)
    return run


def same(_):
    return True


def test_a_run_that_has_not_changed_goes_on(run, said):
    assert run.begins_at(resume=True) == "global_step4"
    run.check_same("global_step4", facts(), (), same)
    assert run.changed == []
    assert said == []


CHANGED = {
    "model": {"model": {**MODEL, "resid_pdrop": 0.2}},
    "data": {"data": {**DATA, "fingerprint": "b" * 64}},
    "data ": {"data": {**DATA, "seq_len": 32}},
    "tokenizer": {"data": {**DATA, "tokenizer_fingerprint": "c"}},
    "seed": {"config": section(seed=6)},
    "batch": {"config": config(train_micro_batch_size_per_gpu=4)},
    "batch ": {"config": config(gradient_accumulation_steps=2)},
    "batch  ": {"layout": {"replicas": 2}},
    "scheme": {"config": section(mode="interlocking", window=2)},
    "scheme ": {"config": section(head={"token_fraction": 0.5})},
    "scheme  ": {"config": section(link={"codec": "int8"})},
    "scheme   ": {"config": section(replicas={"sync": "periodic", "every": 3})},
}


@pytest.mark.parametrize("change", CHANGED)
def test_each_kind_of_change_needs_its_name(run, change):
    kind = change.strip()
    now = facts(**CHANGED[change])
    others = [other for other in CHANGES if other != kind]
    tokenizer = same if kind != "tokenizer" else lambda _: False
    for allowed in ((), others):
        with pytest.raises(RunError, match=rf"add --allow-change {kind}$"):
            run.check_same("global_step4", now, allowed, tokenizer)
    run.check_same("global_step4", now, [kind], tokenizer)
    assert run.changed == [kind]


def test_all_changes_are_named_with_both_values(run):
    now = facts(data={**DATA, "fingerprint": "b" * 64}, config=section(seed=7))
    with pytest.raises(RunError) as error:
        run.check_same("global_step4", now, (), same)
    assert "data: fingerprint aaaaaaaaaaaa..., now bbbbbbbbbbbb...; seed: seed 5, now 7" in str(
        error.value
    )
    assert str(error.value).endswith("--allow-change data,seed")


@pytest.mark.parametrize(
    "change",
    [
        {"model": {**MODEL, "transformers_version": "6", "new_option": 1}},
        {"config": section(link={"depth": 8, "timeout_seconds": 60})},
        {"config": section(num_stages=2)},
        {"config": config(train_batch_size=8)},
        {"arguments": {"max_steps": 99}},
        {"data": {**DATA, "folder": "elsewhere"}},
    ],
    ids=str,
)
def test_what_changes_no_figure_may_change(run, said, change):
    run.check_same("global_step4", facts(**change), (), same)
    assert said == []


def test_settings_of_the_optimizer_are_said(run, said):
    optimizer = {"type": "AdamW", "params": {"lr": 0.5, "weight_decay": 0.1}}
    changed = config(optimizer=optimizer, scheduler={"type": "WarmupLR"})
    run.check_same("global_step4", facts(config=changed), (), same)
    assert "optimizer.params.lr 0.01, now 0.5" in said[0]
    assert "optimizer.params.weight_decay not set, now 0.1" in said[0]
    assert "scheduler.type not set, now WarmupLR" in said[0]


def test_every_start_is_kept_and_the_origin_of_the_weights(run):
    first = json.loads((run.path / "run.json").read_text())
    assert first["starts"][0]["step"] == 0
    later = facts(weights=None, arguments={"max_steps": 20}, config=section(seed=9))
    run.check_same("global_step4", later, ["seed"], same)
    start(run, later, 4, "global_step4")
    found = json.loads((run.path / "run.json").read_text())
    assert found["weights"] == "gpt2"
    assert found["config"] == later["config"]
    assert found["starts"][0] == first["starts"][0]
    second = found["starts"][1]
    assert (second["step"], second["checkpoint"], second["changed"]) == (
        4,
        "global_step4",
        ["seed"],
    )
    assert second["config"]["local_parallel"]["seed"] == 9
    assert {"time", "host", "pid", "versions", "arguments", "data"} <= second.keys()
    # from now on the run has that seed
    run.check_same("global_step4", later, (), same)


def test_a_run_json_without_starts_counts_as_one(run):
    path = run.path / "run.json"
    old = {key: value for key, value in json.loads(path.read_text()).items() if key != "starts"}
    path.write_text(json.dumps(old))
    run.check_same("global_step4", facts(), (), same)
    start(run, facts(weights=None), 4, "global_step4")
    found = json.loads(path.read_text())
    assert [start["arguments"] for start in found["starts"]] == [{"max_steps": 8}] * 2
    assert found["weights"] == "gpt2"


@pytest.mark.parametrize("damage", [None, "", "{", "[]", "{}"])
def test_a_lost_run_json_makes_unknown_what_only_it_knew(run, said, damage):
    path = run.path / "run.json"
    path.unlink() if damage is None else path.write_text(damage)
    assert run.begins_at(resume=True) == "global_step4"
    with pytest.raises(
        RunError, match=r"run.json is missing or damaged.*--allow-change data,"
    ) as error:
        run.check_same("global_step4", facts(), (), same)
    needed = str(error.value).split()[-1].split(",")
    run.check_same("global_step4", facts(), needed, same)
    start(run, facts(weights=None), 4, "global_step4")
    assert len(json.loads(path.read_text())["starts"]) == 1
    if damage is not None:
        assert (run.path / "run.damaged.json").read_text() == damage


def test_a_folder_that_holds_a_run_is_not_started_over(run):
    with pytest.raises(RunError, match="already holds a run; add --resume to continue it"):
        run.begins_at(resume=False)
    (run.checkpoints / "latest").write_text("gone")
    with pytest.raises(RunError, match="already holds a run"):
        run.begins_at(resume=False)
    with pytest.raises(CheckpointError, match="latest names 'gone'"):
        run.begins_at(resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_never_saved_starts_again(run, said, resume):
    shutil.rmtree(run.checkpoints / "global_step4")
    (run.checkpoints / "latest").unlink()
    (run.path / "metrics.jsonl").write_text('{"step": 3}\n')
    assert run.begins_at(resume) is None
    start(run, facts(weights="other"), 0, None)
    found = json.loads((run.path / "run.json").read_text())
    assert len(found["starts"]) == 2
    assert found["weights"] == "other"
    assert not (run.path / "metrics.jsonl").exists()
    assert (run.path / "metrics-start-1.jsonl").read_text() == '{"step": 3}\n'


def test_what_was_saved_is_resumed_though_the_pointer_is_missing(run):
    (run.checkpoints / "latest").unlink()
    save(run.checkpoints, "best", 3, save_latest=False)
    assert run.begins_at(resume=True) == "global_step4"


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "checkpoints", "loss.png", "logs"])
@pytest.mark.parametrize("resume", [False, True])
def test_files_of_others_are_left_alone(tmp_path, name, resume):
    path = tmp_path / name
    path.mkdir() if name in ("checkpoints", "logs") else path.write_text("mine")
    with pytest.raises(RunError, match=f"holds {name} but no run of ds_local, so it is left alone"):
        RunFolder(tmp_path, print).begins_at(resume)


@pytest.mark.parametrize("name", ["ds_local_files.json", "ds_local.json", "latest"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_data_or_checkpoints_is_no_run(tmp_path, name, resume):
    (tmp_path / name).write_text("{}")
    with pytest.raises(RunError, match=f"holds {name}: it is no folder of a run"):
        RunFolder(tmp_path, print).begins_at(resume)


def test_a_folder_with_other_files_will_do(tmp_path):
    (tmp_path / "slurm-12.out").write_text("")
    assert RunFolder(tmp_path, print).begins_at(resume=False) is None


def test_killed_at_any_file_operation_of_a_start_it_can_be_started_again(tmp_path, said):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    place = tmp_path / "run"

    def begin():
        run = RunFolder(place, lambda _: None)
        assert run.begins_at(resume=False) is None
        run.start(facts(), 0, None, tokenizer)

    number = 0
    for _ in killed_everywhere(begin, place):
        number += 1
        begin()
        copy = place / "checkpoints" / "tokenizer"
        assert (copy / "tokenizer.json").read_text() == "{}"
        shutil.rmtree(place)
    assert number > 10


def test_the_tokenizer_is_copied_anew_when_it_changed(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "templates").mkdir()
    (other / "templates" / "chat.txt").write_text("{}")
    run.start(facts(), 4, "global_step4", other)
    copy = run.checkpoints / "tokenizer"
    assert [str(p.relative_to(copy)) for p in copy.rglob("*.*")] == ["templates/chat.txt"]


def test_a_disk_that_takes_no_start_is_said(tmp_path):
    with small_disk(tmp_path / "disk", "size=16k") as disk:
        (disk / "filler").write_bytes(b"x" * 9_000)
        (tmp_path / "tokenizer").mkdir()
        (tmp_path / "tokenizer" / "tokenizer.json").write_text("x" * 20_000)
        with pytest.raises(
            RunError,
            match=r"cannot write to .*No space left on device \(0 bytes are free\); make room",
        ):
            RunFolder(disk / "run", print).start(facts(), 0, None, tmp_path / "tokenizer")


def test_tokenizers_are_the_same_by_their_files_or_by_what_they_do(run, tmp_path):
    def never(*_):
        raise DataError("another tokenizer")

    copy, data = run.checkpoints / "tokenizer", tmp_path / "tokenizer"
    assert tokenizer_test(never, data)(copy)
    (data / "tokenizer.json").write_text("{ }")
    assert not tokenizer_test(never, data)(copy)
    assert tokenizer_test(lambda *_: True, data)(copy)
