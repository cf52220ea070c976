"""Saving: DeepSpeed's files, whole or not there, and what is ours beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from shutil import disk_usage
from typing import Any

from torch import Tensor

from ds_local.checkpoints.by_name import NAMES
from ds_local.checkpoints.folder import Writing
from ds_local.engine.async_saves import KeptFiles
from ds_local.engine.deepspeed_seam import shares_of
from ds_local.engine.finite_weights import check_weights_finite
from ds_local.engine.safe_files import RESERVED, unloadable
from ds_local.engine.updates import StageUpdates
from ds_local.errors import CheckpointError, SaveError
from ds_local.links.agreement import gather, together
from ds_local.model.families import config_dict
from ds_local.outputs import reason
from ds_local.outputs.checkpoint_names import tag_of
from ds_local.schedules.run_plan import head_segments


def save(
    engine: StageUpdates,
    write: Callable[[str, Mapping[str, Any]], Any],
    save_dir: str,
    tag: str | None,
    client_state: Mapping[str, Any],
    save_latest: bool,
) -> None:
    """Save a checkpoint; the folder `save_dir/tag` appears complete or not at all: by the end of
    this call, or with asynchronous saves by that of `engine.saves.wait()`.

    Reports come first: who keeps them has all figures of the saved steps before `latest` says so.

    Args:
        write: DeepSpeed's own saving, given the temporary tag and what goes into its state files.

    Raises:
        SaveError: on all ranks, when the disk of one does not take it; the checkpoint before it is
            whole and nothing is left of this one, so training can go on.
        CheckpointError: for a tag that is no plain file name, state that could not be loaded, or
            weights that are not finite.
    """
    if engine.saves is not None:
        engine.saves.settle()  # one at a time
    engine.reports.flush()
    together(lambda: _check_loadable(engine, client_state))
    tag = str(tag or tag_of(engine.global_steps))
    kept = "what was saved before stays; go on from there"
    check_weights_finite(engine, f"the checkpoint {save_dir}/{tag} is not written:", kept)
    writing = Writing(save_dir, tag)
    inner = engine.checkpoint_engine
    files = _Files(inner)
    later = None if engine.saves is None else KeptFiles(inner, engine.saves)
    engine.checkpoint_engine = taking = files if later is None else later
    try:
        target = str(writing.target)
        taking.makedirs(target, exist_ok=True)
        engine.copies.save(taking.save, target, engine.global_steps, engine.replica_id)
        if engine.replica_id == 0:  # replicas have the same
            engine.executor.stash.save(taking.save, target)
            engine.average.save(taking.save, target)
        engine.replicas.save(taking.save, target)
        with engine.replicas.whole(moments=True):
            write(writing.partial, {**client_state, NAMES: _names(engine)})
    except BaseException:
        writing.abandon()
        raise
    finally:
        engine.checkpoint_engine = inner
    facts = facts_of(engine)

    def finish() -> None:
        if later is not None:
            later.write(files)
        _commit(writing, files, facts, save_latest)

    if engine.saves is None:
        finish()
    else:
        engine.saves.start(finish)


def _commit(writing: Writing, files: _Files, facts: Mapping[str, Any], save_latest: bool) -> None:
    """Give what all ranks have written its name, or leave nothing of it."""
    try:
        together(files.check)
        writing.commit(facts, save_latest)
    except SaveError as error:  # on all ranks
        writing.abandon()
        gather(None)  # the partial one is gone
        free = disk_usage(writing.folder).free
        needed, frees = zip(*gather((files.needed, free)), strict=True)
        words = str(error).replace(writing.partial, writing.tag)
        raise SaveError(
            f"{words}; the checkpoint needs {sum(needed):,} bytes, {min(frees):,} are free; the "
            "one before it is whole"
        ) from error
    except BaseException:
        writing.abandon()
        raise


class _Files:
    """DeepSpeed's checkpoint engine up to the first file that cannot be written. From then on this
    rank only counts, until all ranks meet: in between DeepSpeed waits for all of them."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.needed = 0  # bytes of all files of this rank
        self._failure: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        self.needed += sum(tensor.nbytes for tensor in _tensors(state_dict))
        self._try(path, lambda: self.inner.save(state_dict=state_dict, path=path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._try(path, lambda: self.inner.makedirs(path, exist_ok=exist_ok))

    def _try(self, path: str, action: Callable[[], Any]) -> None:
        if self._failure is not None:
            return
        try:
            action()
        except Exception as error:
            self._failure = self._explained(error, path)

    def _explained(self, error: Exception, path: str) -> Exception:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            return error
        folder = next(one for one in Path(path).absolute().parents if one.exists())
        explained = SaveError(f"cannot save {path}: {reason(cause, folder, room=False)}")
        explained.__cause__ = error
        return explained

    def check(self) -> None:
        """Raises what went wrong here."""
        if self._failure is not None:
            raise self._failure

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _check_loadable(engine: StageUpdates, client_state: Mapping[str, Any]) -> None:
    """Refuse what could be saved but not be loaded again, and weights that are half updated."""
    if engine.half_updated:
        raise CheckpointError(
            f"step {engine.global_steps + 1} ended in the middle of its update, so weights are of "
            "two steps; what was saved before stays: go on from there"
        )
    for key in client_state:
        if not isinstance(key, str) or key in RESERVED:
            raise CheckpointError(
                f"client_state has the key {key!r}, which must be text and none of DeepSpeed's own "
                f"({', '.join(RESERVED)}); rename it"
            )
    scheduler = engine.lr_scheduler
    found = unloadable(dict(client_state), "client_state") or unloadable(
        engine.config, "the DeepSpeed config"
    )
    if found is None and scheduler is not None:
        found = unloadable(scheduler.state_dict(), "the scheduler's state")
    if found is not None:
        raise CheckpointError(
            f"{found}, which could be saved but never loaded; give plain numbers, text, lists, "
            "dicts or tensors"
        )


def _names(engine: StageUpdates) -> list[list[str]]:
    """Of the parameters in each group of this stage's optimizer, in their order."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    return [
        [names.get(share.parameter, "") for share in group] for group in shares_of(engine.optimizer)
    ]


def facts_of(engine: StageUpdates) -> dict[str, Any]:
    """What a checkpoint says about itself."""
    module = engine.module
    by_config = None if engine.client_optimizer else engine.optimizer_name()
    return {
        "step": engine.global_steps,
        **({} if module.unit is None else {"unit": module.unit.number}),
        "num_stages": module.pipeline_stages,
        "num_replicas": engine.dp_world_size,
        "segment_parts": module.segment_parts,
        "segment_stages": list(module.stage_of),
        "head_segments": sorted(head_segments(engine.section, engine.num_segments)),
        "local_parallel": engine.section.model_dump(mode="json"),
        "model": None if module.hf_config is None else config_dict(module.hf_config),
        "optimizer": {
            "type": (by_config or type(engine.basic_optimizer).__name__).lower(),
            "precision": "bf16" if engine.bfloat16_enabled() else "fp32",
            "zero_stage": int(engine.zero_optimization_stage()),
        },
        "scheduler": None if engine.lr_scheduler is None else type(engine.lr_scheduler).__name__,
    }
