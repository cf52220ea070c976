"""One checkpoint of the whole pipeline, put together from those of its units.

A unit is a job of its own with a run folder of its own, RUN/unit-N. Its files have the numbers of
the whole pipeline, so together they are a checkpoint as one job would write it: files are linked,
or copied where that cannot be, and compared with the sums that the units took.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ds_local.checkpoints.facts import FACTS, read_facts, write_facts
from ds_local.checkpoints.folder import Writing, complete_tags, latest_tag, locate
from ds_local.checkpoints.gathered_books import GATHERED, check_free, write_books
from ds_local.checkpoints.run_file import RUN_FILE, run_facts
from ds_local.config.deepspeed import batch_sizes
from ds_local.config.files import local_parallel
from ds_local.config.strict import SECTION
from ds_local.errors import CheckpointError, RunError, SaveError
from ds_local.outputs import leftovers, reason, remove, scratch_name, write_whole
from ds_local.outputs.checkpoint_names import LAYER_FILE, STAGE_FILE, step_of, tag_of
from ds_local.schedules.run_plan import RunPlan
from ds_local.schedules.units import unit_folders, units_of

_SCRATCH = "whole"
_OF_A_UNIT = ("unit", "files", "seal", SECTION)  # keys of ds_local.json
_ATTEMPTS = 3  # units that go on remove older checkpoints meanwhile


class Found(NamedTuple):
    """A step of which every unit has a checkpoint."""

    step: int
    places: list[Path]  # of the checkpoints, in the order of units
    runs: list[Path]  # folders of the units, likewise


def gather_units(run: str | Path, output: str | Path | None = None) -> Path:
    """Write a checkpoint of the whole pipeline, of the newest step of which every unit has one.

    Args:
        run: folder of the whole run, with a folder of each unit.
        output: run folder to write to; default `run`.

    Returns:
        The checkpoint's folder, which appears whole or not at all.

    Raises:
        CheckpointError: when there is no such step, naming a unit, or files are damaged.
        RunError: when `run` has no units, or `output` holds something else.
        SaveError: when it cannot be written.
    """
    run, output = Path(run), Path(run if output is None else output)
    if not (units := unit_folders(run)):
        raise RunError(f"{run} holds no unit-N folder; give the --output of a run with --unit")
    check_free(units, output)
    return _trying(run, lambda found: _written(found, output))


@contextmanager
def whole_run(source: str | Path) -> Iterator[Path]:
    """A run folder with one checkpoint of the whole pipeline: `source` itself, or for a run whose
    units are jobs of their own a light one that is there as long as the block lasts.

    Raises:
        CheckpointError: when the units have no step in common.
    """
    source = Path(source)
    gathered = _gathered_step(source)
    if not unit_folders(source) or (gathered is None and (source / RUN_FILE).exists()):
        yield source
        return
    found = find_common(source)
    if found.step == gathered:
        yield source
        return
    scratch = _scratch_beside(source)
    try:
        _trying(source, lambda found: _light(found, scratch))
        yield scratch
    finally:
        remove(scratch)


def find_common(run: Path) -> Found:
    """The newest step of which every unit has a checkpoint.

    Raises:
        CheckpointError: naming a unit that has none of a step that others have.
    """
    folders = unit_folders(run)
    known = [run_facts(folder) for several in folders.values() for folder in several]
    facts = next(filter(None, known), None)
    if facts is None:
        raise CheckpointError(f"no unit in {run} has a run.json yet; let them take a first step")
    numbers = range(_count_of_units(facts))
    missing = [number for number in numbers if number not in folders]
    if missing:
        raise CheckpointError(
            f"{run} has no folder unit-{missing[0]}, and the pipeline has {len(numbers)} units; "
            "start that unit with the same --output, or bring its folder here"
        )
    steps = {number: _steps_in(folders[number]) for number in numbers}
    common = set.intersection(*(set(found) for found in steps.values()))
    if not common:
        raise CheckpointError(_nothing_common(run, steps, facts))
    step = max(common)
    runs = [steps[number][step] for number in numbers]
    places = [locate(one / "checkpoints", tag_of(step)) for one in runs]
    return Found(step, places, runs)


# --- what there is --------------------------------------------------------------------------------


def _steps_in(folders: Sequence[Path]) -> dict[int, Path]:
    """Step -> the folder, among those of a unit's replicas, with a checkpoint that the loop made.
    Replicas have the same weights."""
    return {
        step: folder
        for folder in reversed(folders)
        for step in map(step_of, complete_tags(folder / "checkpoints"))
        if step is not None
    }


def _nothing_common(run: Path, steps: Mapping[int, Mapping[int, Path]], facts: Any) -> str:
    counts = Counter(step for found in steps.values() for step in found)
    if not counts:
        return f"no unit in {run} has a checkpoint yet; let them come to their first save"
    step = max(counts, key=lambda one: (counts[one], one))
    unit = next(number for number, found in steps.items() if step not in found)
    newest = f"its newest is of {max(steps[unit])}" if steps[unit] else "it has none"
    theirs = "; ".join(
        f"unit {number} {', '.join(map(str, sorted(found)[-3:])) or 'none'}"
        for number, found in steps.items()
    )
    keeps = (facts.get("arguments") or {}).get("keep_last")
    remedy = "let the units come to a step that all save"
    if keeps:
        remedy += f", or start them with a larger --keep-last (now {keeps})"
    return (
        f"unit {unit} has no checkpoint of step {step}; {newest}, and no step is common to all "
        f"units in {run} ({theirs}); {remedy}"
    )


def _count_of_units(facts: Mapping[str, Any]) -> int:
    section = local_parallel(facts["config"])
    _, micro_batches = batch_sizes(facts["config"], 1)
    return len(units_of(RunPlan.of(section, facts["layout"]["stages"], micro_batches)))


def _gathered_step(run: Path) -> int | None:
    """The step of the newest gathered checkpoint of a run folder in which no job has a run."""
    if GATHERED not in run_facts(run):
        return None
    checkpoints = run / "checkpoints"
    with suppress(CheckpointError):
        return int(read_facts(locate(checkpoints, latest_tag(checkpoints)))["step"])
    return -1


def _trying(run: Path, write: Any) -> Path:
    """Write what is found; again where a checkpoint was removed by its unit meanwhile."""
    for left in reversed(range(_ATTEMPTS)):
        found = find_common(run)
        try:
            written: Path = write(found)
            return written
        except (CheckpointError, FileNotFoundError) as error:
            if not left or all((place / FACTS).is_file() for place in found.places):
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(
                    f"checkpoints in {run} are removed faster than they can be read; start the "
                    "units with a larger --keep-last"
                ) from error
    raise AssertionError("the last attempt returns or raises")


# --- putting it together --------------------------------------------------------------------------


def _written(found: Found, output: Path) -> Path:
    """A checkpoint that stays, its sums compared with those of the units."""
    facts, tag = _facts_of_whole(found), tag_of(found.step)
    checkpoints = output / "checkpoints"
    with suppress(CheckpointError):
        if read_facts(checkpoints / tag)["files"] == facts["files"]:  # a kill came after it
            write_whole(checkpoints / "latest", tag)
            return checkpoints / tag
    writing = Writing(checkpoints, tag)
    try:
        writing.target.mkdir(parents=True, exist_ok=True)
        _take_files(found, writing.target, _copy)
        write_books(found.step, found.runs, output)
        writing.commit(facts, True, facts["files"])
    except FileNotFoundError:
        writing.abandon()
        raise
    except OSError as error:
        writing.abandon()
        raise SaveError(f"cannot write to {output}: {reason(error, checkpoints)}") from error
    except BaseException:
        writing.abandon()
        raise
    return checkpoints / tag


def _light(found: Found, scratch: Path) -> Path:
    """One to read from and remove. Who reads a file compares its sum."""
    facts, tag = _facts_of_whole(found), tag_of(found.step)
    target = scratch / "checkpoints" / tag
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    _take_files(found, target, lambda source, place: place.symlink_to(source.absolute()))
    write_books(found.step, found.runs, scratch)
    write_whole(target / FACTS, write_facts(facts))
    write_whole(scratch / "checkpoints" / "latest", tag)
    return target


def _scratch_beside(run: Path) -> Path:
    """A new folder in the run's, on the same file system, or elsewhere where that is read-only."""
    for left in leftovers(run, name=_SCRATCH):
        remove(left)
    scratch = run / scratch_name(_SCRATCH)
    try:
        scratch.mkdir()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="ds_local-"))
    return scratch


def _take_files(found: Found, target: Path, otherwise: Any) -> None:
    for place in found.places:
        for name in read_facts(place)["files"]:
            try:
                os.link(place / name, target / name)
            except FileNotFoundError:
                raise
            except OSError:  # another file system, or one without links
                otherwise(place / name, target / name)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _facts_of_whole(found: Found) -> dict[str, Any]:
    """ds_local.json of the whole.

    Raises:
        CheckpointError: when the parts do not belong together.
    """
    parts = [read_facts(place) for place in found.places]
    whole = {key: value for key, value in parts[0].items() if key not in _OF_A_UNIT}
    files: dict[str, Any] = {}
    for number, (place, part) in enumerate(zip(found.places, parts, strict=True)):
        other = next((key for key in whole if part[key] != whole[key]), None)
        other = other or (SECTION if _scheme(part) != _scheme(parts[0]) else None)
        twice = sorted(files.keys() & part["files"].keys())
        if other or twice or part["unit"] != number:
            why = f"has another {other}" if other else f"also has {twice[0]}" if twice else ""
            raise CheckpointError(
                f"{place} {why or f'is not of unit {number}'}, so it does not belong to "
                f"{found.places[0]}; gather units that were started with the same configuration"
            )
        files |= part["files"]
    parts_of_model = range(whole["segment_parts"][-1]), range(whole["num_stages"])
    needed = [LAYER_FILE.format(layer) for layer in parts_of_model[0]]
    needed += [STAGE_FILE.format(stage) for stage in parts_of_model[1]]
    if missing := [name for name in needed if name not in files]:
        raise CheckpointError(
            f"no unit has {missing[0]} of step {found.step} ({', '.join(map(str, found.places))}); "
            "use another checkpoint"
        )
    section = {**parts[0][SECTION], "link": {**parts[0][SECTION]["link"], "reconnect_seconds": 0.0}}
    return {**whole, SECTION: section, "files": files}


def _scheme(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts[SECTION].items() if key != "link"}
