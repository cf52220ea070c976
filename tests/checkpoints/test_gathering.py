"""Checkpoints of units, written by hand, put together to one of the whole pipeline."""

import errno
import json
import os
import shutil

import pytest
import torch
from commands import command
from families import layers_of
from killed import killed_everywhere
from reference import GPT2

from ds_local.checkpoints import gathering
from ds_local.checkpoints.facts import read_facts
from ds_local.checkpoints.folder import Writing, complete_tags, latest_tag
from ds_local.checkpoints.gathering import find_common, gather_units, whole_run
from ds_local.checkpoints.hf_export import export
from ds_local.checkpoints.source import Checkpoint
from ds_local.checkpoints.sums import verify
from ds_local.config.schema import LocalParallelConfig
from ds_local.config.sections import HeadConfig
from ds_local.data.documents import Document
from ds_local.data.tokenizers import load_tokenizer, make_tokenizer
from ds_local.errors import CheckpointError, ExportError, RunError
from ds_local.model import blocks, families
from ds_local.outputs.checkpoint_names import HEAD_FILE

PARTS = [0, 2, 4, 6]  # three segments of a model of four blocks
SECTION = {"mode": "local", "num_stages": 3, "link": {"reconnect_seconds": 60, "depth": 2}}
SOME_TEXT = " ".join(f"{a}{b}{c}" for a in "abcde" for b in "abcde" for c in "abcde")
CONFIG = families.load_model_config(GPT2)


def save(run, unit, step, part=None, /, **more):
    """A checkpoint of one unit."""
    writing = Writing(run / f"unit-{unit}" / "checkpoints", f"global_step{step}")
    writing.target.mkdir(parents=True)
    for number, layer in enumerate(layers_of(CONFIG)):
        if PARTS[unit] <= number < PARTS[unit + 1]:
            state = {name: tensor + step for name, tensor in layer.state_dict().items()}
            torch.save(state, writing.target / f"layer_{number:02d}-model_states.pt")
    torch.save({"step": step}, writing.target / f"mp_rank_{unit:02d}_model_states.pt")
    if unit < 2:
        head = blocks.make_head(CONFIG, unit, 3, HeadConfig(), PARTS)
        torch.save(head.state_dict(), writing.target / HEAD_FILE.format(unit))
    facts = {
        "step": step,
        "unit": unit,
        "num_stages": 3,
        "num_replicas": 1,
        "segment_parts": PARTS,
        "segment_stages": [0, 1, 2],
        "head_segments": [0, 1],
        "local_parallel": LocalParallelConfig(**(part or SECTION)).model_dump(mode="json"),
        "model": families.config_dict(CONFIG),
        "optimizer": {"type": "adamw", "precision": "fp32", "zero_stage": 0},
        "scheduler": None,
    }
    writing.commit({**facts, **more}, True)


def note(run, unit, steps):
    """The books of one unit."""
    folder = run / f"unit-{unit}"
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "arguments": {"unit": unit, "keep_last": 2},
        "config": {"train_micro_batch_size_per_gpu": 2, "local_parallel": SECTION},
        "model": families.config_dict(CONFIG),
        "weights": None,
        "data": {},
        "layout": {
            "stages": 3,
            "parameters": [10 + unit],
            "head_parameters": [unit],
            "hosts": {f"stage {unit}": {}},
        },
        "starts": [{"step": 0, "time": f"2026-01-01T00:0{3 - unit}"}],
    }
    (folder / "run.json").write_text(json.dumps(facts))
    rows = [
        {
            "step": step,
            "segment": unit,
            "stage": unit,
            "split": split,
            "loss": step + unit / 10,
            "tokens": 8 * step,
            "seconds": 1.0,
        }
        for step in steps
        for split in ("train", "validation")
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    run = tmp_path_factory.mktemp("written") / "run"
    for unit in range(3):
        note(run, unit, (2, 4, 6))
        save(run, unit, 4)
        if unit < 2:
            save(run, unit, 6)
    return run


@pytest.fixture
def run(written, tmp_path):
    """All units have a checkpoint of step 4, the lower two one of step 6."""
    return shutil.copytree(written, tmp_path / "run")


def test_the_newest_step_that_all_have_becomes_one_checkpoint(run):
    place = gather_units(run)
    assert place == run / "checkpoints" / "global_step4"
    assert latest_tag(run / "checkpoints") == "global_step4"
    facts = verify(place)
    assert (facts["step"], facts["unit"], facts["num_stages"]) == (4, None, 3)
    assert facts["local_parallel"]["link"]["reconnect_seconds"] == 0
    assert facts["local_parallel"]["link"]["depth"] == 2
    layers = [f"layer_{number:02d}-model_states.pt" for number in range(6)]
    states = [f"mp_rank_{stage:02d}_model_states.pt" for stage in range(3)]
    heads = [HEAD_FILE.format(segment) for segment in (0, 1)]
    assert set(facts["files"]) == {*layers, *states, *heads}
    first = run / "unit-0" / "checkpoints" / "global_step4" / layers[0]
    assert (place / layers[0]).samefile(first)


def test_its_books_are_those_of_one_job(run):
    gather_units(run)
    facts = json.loads((run / "run.json").read_text())
    assert facts["layout"]["parameters"] == [10, 11, 12]
    assert facts["layout"]["head_parameters"] == [0, 1, 2]
    assert list(facts["layout"]["hosts"]) == ["stage 0", "stage 1", "stage 2"]
    assert facts["config"]["local_parallel"] == {**SECTION, "link": {"depth": 2}}
    assert facts["arguments"]["unit"] is None
    assert [start["unit"] for start in facts["starts"]] == [2, 1, 0]  # by time
    assert facts["gathered"]["step"] == 4
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["split"], row["segment"]) for row in rows] == [
        (step, split, segment)
        for step in (2, 4)
        for split in ("train", "validation")
        for segment in range(3)
    ]


def test_a_later_one_is_added_and_the_same_is_left_as_it_is(run):
    first = gather_units(run)
    before = (first / "ds_local.json").stat().st_mtime_ns
    assert gather_units(run) == first
    assert (first / "ds_local.json").stat().st_mtime_ns == before
    save(run, 2, 6)
    assert gather_units(run).name == "global_step6"
    assert complete_tags(run / "checkpoints") == ["global_step4", "global_step6"]
    assert latest_tag(run / "checkpoints") == "global_step6"


def test_another_folder_and_another_file_system(run, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refused)
    place = gather_units(run, tmp_path / "whole")
    verify(place)
    assert place.parents[1] == tmp_path / "whole"
    assert not (run / "checkpoints").exists()
    assert all(not path.is_symlink() and path.stat().st_nlink == 1 for path in place.iterdir())


def test_a_unit_without_the_step_is_named(run):
    shutil.rmtree(run / "unit-2" / "checkpoints" / "global_step4")
    save(run, 2, 2)
    with pytest.raises(CheckpointError) as caught:
        gather_units(run)
    assert str(caught.value) == (
        "unit 2 has no checkpoint of step 6; its newest is of 2, and no step is common to all "
        f"units in {run} (unit 0 4, 6; unit 1 4, 6; unit 2 2); let the units come to a step that "
        "all save, or start them with a larger --keep-last (now 2)"
    )
    for left in ("checkpoints", "run.json", "metrics.jsonl"):
        assert not (run / left).exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: shutil.rmtree(run / "unit-1"), "has no folder unit-1, and the pipeline has 3"),
        (lambda run: (run / "unit-1" / "run.json").write_text("{"), "unit-1/run.json is missing"),
        (
            lambda run: [shutil.rmtree(path) for path in run.glob("unit-*/checkpoints")],
            "no unit in .* has a checkpoint yet",
        ),
        (
            lambda run: [path.unlink() for path in run.glob("unit-*/run.json")],
            "no unit in .* has a run.json yet",
        ),
        (lambda run: save(run, 1, 4, {**SECTION, "seed": 5}), "has another local_parallel"),
        (lambda run: save(run, 1, 4, scheduler="WarmupLR"), "has another scheduler"),
        (lambda run: save(run, 1, 4, unit=0), "is not of unit 1"),
        (
            lambda run: next(run.glob("unit-2/*/global_step4/mp*")).write_bytes(b"0"),
            "mp_rank_02_model_states.pt of global_step4 is damaged",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(run, spoil, said):
    spoil(run)
    with pytest.raises(CheckpointError, match=said):
        gather_units(run)
    assert not (run / "checkpoints" / "global_step4").exists()
    assert not list(run.glob("checkpoints/.*"))


def test_links_may_change_between_starts(run):
    save(run, 1, 4, {**SECTION, "link": {"reconnect_seconds": 9}})
    verify(gather_units(run))


def test_a_run_of_one_job_is_left_alone(run, tmp_path):
    with pytest.raises(RunError, match=r"holds no unit-N folder"):
        gather_units(tmp_path)
    gather_units(run)
    facts = json.loads((run / "run.json").read_text())
    del facts["gathered"]  # as a job that goes on from there writes it
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(RunError, match=r"holds the run of one job, so it is left alone"):
        gather_units(run)
    with whole_run(run) as same:
        assert same == run


def test_files_of_the_user_are_left_alone(run, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "metrics.jsonl").write_text("notes\n")
    with pytest.raises(RunError, match=r"holds metrics.jsonl but no run of ds_local"):
        gather_units(run, own)
    assert [path.name for path in own.iterdir()] == ["metrics.jsonl"]
    assert (own / "metrics.jsonl").read_text() == "notes\n"


def test_two_runs_are_not_gathered_into_one(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    for path in other.glob("unit-*/run.json"):
        path.write_text(path.read_text().replace("2026-01-01", "2026-01-02"))
    gather_units(run, tmp_path / "whole")
    before = (tmp_path / "whole" / "run.json").read_text()
    with pytest.raises(RunError, match=r"holds what was gathered from another run"):
        gather_units(other, tmp_path / "whole")
    assert (tmp_path / "whole" / "run.json").read_text() == before
    save(run, 2, 6)
    assert gather_units(run, tmp_path / "whole").name == "global_step6"


def test_a_replica_stands_in_for_another(run):
    for unit in range(3):
        (run / f"unit-{unit}").rename(run / f"unit-{unit}-replica-0")
        shutil.copytree(run / f"unit-{unit}-replica-0", run / f"unit-{unit}-replica-1")
    shutil.rmtree(run / "unit-1-replica-0" / "checkpoints")
    found = find_common(run)
    assert [path.name for path in found.runs] == [
        "unit-0-replica-0",
        "unit-1-replica-1",
        "unit-2-replica-0",
    ]
    verify(gather_units(run))


def test_a_checkpoint_that_its_unit_removes_meanwhile_is_looked_for_again(run, monkeypatch):
    save(run, 2, 6)
    take, left = gathering._take_files, [6]

    def taking(found, target, otherwise):
        if left:
            for unit in range(3):
                shutil.rmtree(run / f"unit-{unit}" / "checkpoints" / f"global_step{left[0]}")
            left.clear()
        take(found, target, otherwise)

    monkeypatch.setattr(gathering, "_take_files", taking)
    assert gather_units(run).name == "global_step4"


def test_it_is_whole_or_not_there_wherever_it_is_killed(run):
    for _ in killed_everywhere(lambda: gather_units(run), run / "checkpoints"):
        for tag in complete_tags(run / "checkpoints"):
            verify(run / "checkpoints" / tag)
        if (run / "checkpoints" / "latest").exists():
            assert latest_tag(run / "checkpoints") == "global_step4"
    assert not list((run / "checkpoints").glob(".*"))


# --- models ---------------------------------------------------------------------------------------


def test_a_model_is_exported_from_units_without_a_trace(run, tmp_path):
    tokenizer = make_tokenizer("sentencepiece:300", [Document("a", SOME_TEXT)])
    for unit in range(3):
        facts = json.loads((run / f"unit-{unit}" / "run.json").read_text())
        tokenizer.save_pretrained(run / f"unit-{unit}" / "checkpoints" / "tokenizer")
        (run / f"unit-{unit}" / "run.json").write_text(json.dumps(facts))
    out = export(run, tmp_path / "out")
    assert load_tokenizer(out).get_vocab() == tokenizer.get_vocab()
    assert "for 4 optimizer steps" in (out / "README.md").read_text()
    assert sorted(path.name for path in run.iterdir()) == ["unit-0", "unit-1", "unit-2"]
    place = gather_units(run)
    assert (place.parent / "tokenizer").is_dir()
    with whole_run(run) as same:
        assert same == run
    save(run, 2, 6)
    with whole_run(run) as light:  # units have gone on
        assert Checkpoint(light).facts["step"] == 6
        assert light != run
    assert not light.exists()


def test_what_cannot_be_exported_says_why(run, tmp_path):
    with pytest.raises(ExportError, match=rf"is of unit 1 alone; give the run folder .*{run}"):
        export(run / "unit-1", tmp_path / "out")
    shutil.rmtree(run / "unit-2" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"unit 2 has no checkpoint of step 6; it has none"):
        export(run, tmp_path / "out")


def test_the_command_says_where_it_is(run):
    done = command("gather", run)
    assert (done.returncode, done.stdout) == (0, f"{run / 'checkpoints' / 'global_step4'}\n")
    assert read_facts(done.stdout.strip())["step"] == 4
    done = command("gather", run / "unit-0")
    assert done.returncode == 1
    assert "holds no unit-N folder; give the --output of a run with --unit" in done.stderr
