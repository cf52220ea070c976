"""What a rank does to itself, called before its script runs (see fork_server.py).

Nothing of the package is imported by name: engines are found among the subclasses of DeepSpeed's.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

TOUCHED = "FAULTS: the weights had changed"


def watch_loading() -> None:
    """Say so when a checkpoint is refused after weights have changed."""

    def watched(load: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
        before = _digest(engine.module)
        try:
            return load(engine, *args, **kwargs)
        except BaseException:
            if _digest(engine.module) != before:
                print(TOUCHED, file=sys.stderr, flush=True)
            raise

    _wrap_method("load_checkpoint", watched)


def _digest(module: Any) -> str:
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().float().numpy().tobytes())
    return digest.hexdigest()


def _wrap_method(name: str, wrapper: Callable[..., Any]) -> None:
    """Put `wrapper(original, self, ...)` in place of a method of every engine class that has one of its own."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    for kind in _subclasses(PipelineEngine):
        for owner in kind.__mro__:
            if name in vars(owner) and owner.__module__.startswith("ds_local"):
                original = vars(owner)[name]
                if not hasattr(original, "_watched"):

                    def replaced(
                        self: Any, *args: Any, _original: Any = original, **kwargs: Any
                    ) -> Any:
                        return wrapper(_original, self, *args, **kwargs)

                    replaced._watched = True  # type: ignore[attr-defined]
                    setattr(owner, name, replaced)


def _subclasses(kind: type) -> Iterator[type]:
    for one in kind.__subclasses__():
        yield one
        yield from _subclasses(one)


def poison(
    what: str, value: str, first_step: int, last_step: int, block: int, micro_batch: int
) -> None:
    """Put a number that is not finite into one micro-batch of some optimizer steps.

    Args:
        what: "activation" or "gradient" at a block's output, or "loss".
        value: "nan", "inf" or "-inf".
        first_step, last_step: counted from 1, as in metrics.jsonl.
        block: among the transformer blocks of this rank; of losses it is the stage's any.
        micro_batch: how many forward passes of that block (losses of that stage) pass unharmed first.
    """
    import torch

    blocks: list[Any] = []
    bad = False  # within one of the steps
    passed = 0  # forward passes or losses of the step

    def step(train_batch: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal bad, passed
        blocks[:] = [m for m in engine.module.modules() if type(m).__name__ == "GPT2Block"]
        bad, passed = first_step <= engine.global_steps + 1 <= last_step, 0
        try:
            return train_batch(engine, *args, **kwargs)
        finally:
            bad = False

    def hit() -> bool:
        nonlocal passed
        passed += 1
        return bad and passed == micro_batch + 1

    def spoiled(tensor: torch.Tensor) -> torch.Tensor:
        stain = torch.zeros_like(tensor)
        stain.view(-1)[0] = float(value)
        return tensor + stain

    def after_block(module: Any, _: Any, output: Any) -> Any:
        if not bad or block >= len(blocks) or module is not blocks[block] or not hit():
            return None
        first = output[0] if isinstance(output, tuple) else output
        if what == "gradient":
            first.register_hook(spoiled)
            return None
        return (spoiled(first), *output[1:]) if isinstance(output, tuple) else spoiled(first)

    _wrap_method("train_batch", step)
    if what == "loss":
        for name in ("cross_entropy", "linear_cross_entropy"):
            loss = getattr(torch.nn.functional, name, None)
            if loss is not None:

                def poisoned(*args: Any, _loss: Any = loss, **kwargs: Any) -> Any:
                    found = _loss(*args, **kwargs)
                    return found + float(value) if hit() else found

                setattr(torch.nn.functional, name, poisoned)
    else:
        torch.nn.modules.module.register_module_forward_hook(after_block)
