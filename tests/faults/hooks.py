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
