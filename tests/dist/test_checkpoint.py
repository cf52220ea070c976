"""Checkpoints: exact, whole or not there, checked before use, and safe to read."""

import json
import os
import pickle
import shutil

import jobs
import pytest
import torch
from jobs import PRECISIONS
from ranks import run_ranks
from samples import sampled

LOCAL = {"mode": "local"}
ALONE = {"mode": "local", "segments_per_stage": 2}
MIX = {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]}
PHASES = {"phases": [{"until_step": 4, "mode": "local"}, {"mode": "interlocking", "window": 2}]}
SCHEDULER = {
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": 10, "warmup_num_steps": 2},
    }
}


def train_and_save(section, stages, folder, before, after, **settings):
    """Train `before` steps, save, go on for `after` steps; the losses of the latter."""
    engine = jobs.build(section, stages, **settings)
    data = jobs.batches(engine)
    for _ in range(before):
        engine.train_batch(data)
    engine.save_checkpoint(folder, client_state={"note": "hello"})
    losses = []
    for _ in range(after):
        engine.train_batch(data)
        losses.append({s: loss.item() for s, loss in engine.segment_losses.items()})
    return losses, jobs.state_of(engine)


def resume(section, stages, folder, after, tag=None, module_only=False, **settings):
    engine = jobs.build(section, stages, **settings)
    path, client_state = engine.load_checkpoint(folder, tag, load_module_only=module_only)
    assert path is not None
    assert client_state["note"] == "hello"
    data = jobs.batches(engine, start=engine.global_steps)
    losses = []
    for _ in range(after):
        engine.train_batch(data)
        losses.append({s: loss.item() for s, loss in engine.segment_losses.items()})
    return losses, jobs.state_of(engine)


RESUMED = {"local": LOCAL, "mixed": MIX, "phases": PHASES}
LAYOUTS = [(1, 1), (2, 1), (4, 1), (2, 2)]  # stages, replicas


@pytest.mark.parametrize(
    ("section", "layout"),
    sampled(  # every layout, and every section on several ranks
        [*zip(["local", "mixed", "phases", "local"], LAYOUTS, strict=True)],
        [(section, layout) for section in RESUMED for layout in LAYOUTS],
    ),
    ids=str,
)
def test_resume_continues_with_the_same_bits(tmp_path, section, layout):
    stages, replicas = layout
    section = {**RESUMED[section], "segments_per_stage": 4 // stages}
    settings = {"model": {"resid_pdrop": 0.1}, **SCHEDULER}
    straight = run_ranks(
        train_and_save, stages * replicas, section, stages, str(tmp_path), 3, 3, **settings
    )
    resumed = run_ranks(resume, stages * replicas, section, stages, str(tmp_path), 3, **settings)
    check_equal(straight, resumed)


def check_equal(straight, resumed):
    for (losses, state), (other_losses, other_state) in zip(straight, resumed, strict=True):
        assert losses == other_losses
        assert all(torch.equal(tensor, other_state[name]) for name, tensor in state.items())


@pytest.mark.parametrize("precision", sampled(["bf16 ZeRO-1, fp32 sums"], [*PRECISIONS]))
def test_resume_in_every_precision(tmp_path, precision):
    settings = PRECISIONS[precision]
    straight = run_ranks(train_and_save, 4, LOCAL, 2, str(tmp_path), 3, 3, **settings)
    check_equal(straight, run_ranks(resume, 4, LOCAL, 2, str(tmp_path), 3, **settings))


def test_weights_load_into_another_number_of_stages(tmp_path):
    _, saved = run_ranks(
        train_and_save, 2, {**LOCAL, "segments_per_stage": 2}, 2, str(tmp_path), 2, 0
    )[0]
    states = run_ranks(resume, 4, LOCAL, 4, str(tmp_path), 0, module_only=True)
    loaded = {name: tensor for _, state in states for name, tensor in state.items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(train_and_save, 2, LOCAL, 2, str(folder), 1, 0)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def files(folder):
    return sorted(p.name for p in (folder / "global_step1").iterdir())


def test_files_of_a_checkpoint(checkpoint):
    assert files(checkpoint) == [
        "ds_local.json",
        "head_00-model_states.pt",
        *(f"layer_{i:02d}-model_states.pt" for i in range(6)),
        "mp_rank_00_model_states.pt",
        "mp_rank_01_model_states.pt",
    ]
    facts = json.loads((checkpoint / "global_step1" / "ds_local.json").read_text())
    assert facts["step"] == 1
    assert sorted(facts["files"]) == files(checkpoint)[1:]
    assert (checkpoint / "latest").read_text() == "global_step1"


def refusal(*arguments, **settings):
    """What loading says; the weights must still be those of a fresh engine."""
    engine = jobs.build(LOCAL, 2)
    before = jobs.state_of(engine)
    try:
        engine.load_checkpoint(*arguments, **settings)
    except RuntimeError as error:
        after = jobs.state_of(engine)
        unchanged = all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        return f"{type(error).__name__}: {error}", unchanged
    return "loaded", False


def refused(folder, words, tag=None, unchanged=True):
    for said, same in run_ranks(refusal, 2, str(folder), tag):
        assert words in said
        assert same or not unchanged


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete", "swap"])
@pytest.mark.parametrize(
    "name", ["layer_01-model_states.pt", "mp_rank_01_model_states.pt", "head_00-model_states.pt"]
)
def test_damage_is_found_before_anything_is_loaded(copy, damage, name):
    path = copy / "global_step1" / name
    content = path.read_bytes()
    if damage == "flip":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "delete":
        path.unlink()
    else:
        path.write_bytes((copy / "global_step1" / "layer_02-model_states.pt").read_bytes())
    refused(copy, f"{name}" if damage == "delete" else f"is damaged: {name}")


@pytest.mark.parametrize(
    "content", [None, "", "global_step7", "../elsewhere", "/etc", "global_step1.partial"]
)
def test_a_bad_pointer_never_starts_at_step_0(copy, content):
    if content is None:
        (copy / "latest").unlink()
        refused(copy, "complete checkpoints: global_step1")
    else:
        (copy / "latest").write_text(content)
        refused(copy, "CheckpointError")


def test_nothing_to_resume_is_an_error(tmp_path):
    refused(tmp_path, "nothing to resume")


@pytest.mark.parametrize("tag", ["../x", "/tmp/x", "a/b", ".hidden", "x.partial", "a b"])
def test_tags_are_plain_names(tag, checkpoint):
    refused(checkpoint, "must be letters, digits", tag)


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    "name", ["layer_01-model_states.pt", "mp_rank_00_model_states.pt", "head_00-model_states.pt"]
)
def test_reading_runs_no_code(copy, tmp_path, name):
    canary = tmp_path / "canary"
    path = copy / "global_step1" / name
    for write in (
        lambda: path.write_bytes(pickle.dumps(Canary(canary))),
        lambda: torch.save({"x": Canary(canary)}, path),
    ):
        write()
        _seal(copy / "global_step1", name)
        refused(copy, "", unchanged=False)
        assert not canary.exists()


def _seal(folder, name):
    """Make a forged file pass the checksums."""
    from ds_local.checkpoints.sums import _checksum

    facts = json.loads((folder / "ds_local.json").read_text())
    facts["files"][name] = _checksum(folder / name)
    (folder / "ds_local.json").write_text(json.dumps(facts))


def save_and_die(folder, point):
    """Save a second checkpoint and stop at one of the points where a kill could strike."""
    from pathlib import Path

    from ds_local.checkpoints import folder as checkpoint

    engine = jobs.build(ALONE, 1)
    data = jobs.batches(engine)
    engine.train_batch(data)
    engine.save_checkpoint(folder, client_state={"note": "hello"})
    engine.train_batch(data)

    class Killed(Exception):
        pass

    original_save, original_whole, original_sums = (
        engine.checkpoint_engine.save,
        checkpoint._write_whole,
        checkpoint.checksums,
    )
    count = 0

    def save(state_dict, path):
        nonlocal count
        count += 1
        if point == f"file {count}":
            torch.save({}, path)  # half of it
            raise Killed
        original_save(state_dict=state_dict, path=path)

    def write_whole(path, text):
        if point == f"before {Path(path).name}":
            raise Killed
        original_whole(path, text)
        if point == f"after {Path(path).name}":
            raise Killed

    def sums(*args):
        if point == "before checksums":
            raise Killed
        return original_sums(*args)

    engine.checkpoint_engine.save, checkpoint._write_whole, checkpoint.checksums = (
        save,
        write_whole,
        sums,
    )
    try:
        engine.save_checkpoint(folder, client_state={"note": "hello"})
    except Killed:
        return "killed"
    finally:
        checkpoint._write_whole, checkpoint.checksums = original_whole, original_sums
    return "saved"


BEFORE_FACTS = ["before checksums", "before ds_local.json"]
AT_LATEST = ["before latest", "after latest"]


@pytest.mark.parametrize(
    "point",
    sampled(
        ["file 1", "file 6", "before checksums", "after ds_local.json", *AT_LATEST],
        [*(f"file {n}" for n in range(1, 8)), *BEFORE_FACTS, "after ds_local.json", *AT_LATEST],
    ),
)
def test_a_run_killed_while_saving_leaves_a_whole_checkpoint(tmp_path, point):
    assert run_ranks(save_and_die, 1, str(tmp_path), point)[0] == "killed"
    expected = 2 if point == "after latest" else 1
    assert (tmp_path / "latest").read_text() == f"global_step{expected}"
    # whatever has its final name is whole: it passes its checks and loads
    for path in tmp_path.glob("global_step?"):
        run_ranks(resume, 1, ALONE, 1, str(tmp_path), 1, path.name)
