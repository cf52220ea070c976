"""What a rank does to itself, called before its script runs (see fork_server.py).

Nothing of the package is imported by name: engines are found among the subclasses of DeepSpeed's.
"""

from __future__ import annotations

import atexit
import builtins
import functools
import hashlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

TOUCHED = "FAULTS: the weights had changed"


def enter_host(namespace: str, name: str) -> None:
    """Be on one of the hosts of tests/hosts.py: in its network, with its name."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    network, names = 0x40000000, 0x04000000  # CLONE_NEWNET, CLONE_NEWUTS
    with open(f"/run/netns/{namespace}") as file:
        done = libc.setns(file.fileno(), network) or libc.unshare(names)
    if done or libc.sethostname(name.encode(), len(name)):
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


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
    """Put `wrapper(original, self, ...)` in place of a method of every engine class that has one of
    its own."""
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
        micro_batch: how many forward passes of that block (losses of that stage) pass unharmed
            first.
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


# --- file operations ------------------------------------------------------------------------------


class _Operations:
    """Counts what this process does to files below a folder, and kills it at one of them."""

    def __init__(self, folder: str, number: int, count_file: str | None) -> None:
        self.folder, self.number, self.count_file = os.path.realpath(folder), number, count_file
        self.count = 0
        self.armed = False

    def at(self, path: Any, directory: int = -1) -> None:
        """An operation on this path is about to happen, or has just happened."""
        if not self.armed or not self.is_below(path, directory):
            return
        self.count += 1
        if self.count == self.number:
            os.kill(os.getpid(), signal.SIGKILL)

    def is_below(self, path: Any, directory: int = -1) -> bool:
        if isinstance(path, int):
            path = f"/proc/self/fd/{path}"
            path = os.readlink(path) if os.path.lexists(path) else ""
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        name = os.fsdecode(path)
        if not os.path.isabs(name) and directory is not None and directory >= 0:
            name = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), name)
        return os.path.abspath(name).startswith(self.folder + os.sep)

    def report(self) -> None:
        if self.count_file is not None:
            with open(self.count_file, "w") as file:
                file.write(str(self.count))


_counting: list[_Operations] = []  # of this process


def arm() -> None:
    """Count from here on."""
    for operations in _counting:
        operations.armed = True


def kill_at_operation(
    folder: str, number: int, count_file: str | None = None, armed: bool = False
) -> None:
    """SIGKILL at the n-th operation on files below a folder; 0: never, only count them.

    Counted are opening for writing, each half of a write, fsync, renaming, removing, making and
    removing folders, and before and after torch's own writer opens and closes a file.
    """
    operations = _Operations(folder, number, count_file)
    operations.armed = armed
    _counting.append(operations)
    atexit.register(operations.report)
    # event -> positions of (path, directory) among its arguments
    events = {
        "os.rename": ((0, 2), (1, 3)), "os.remove": ((0, 1),), "os.mkdir": ((0, 2),), "os.rmdir": ((0, 1),),
        "os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.truncate": ((0, None),), "os.utime": ((0, 3),),
    }  # fmt: skip
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & writing:
            operations.at(arguments[0])
        for path, directory in events.get(event, ()):
            if operations.armed and operations.is_below(
                arguments[path], -1 if directory is None else arguments[directory]
            ):
                operations.at(arguments[path], -1 if directory is None else arguments[directory])
                break

    sys.addaudithook(audit)
    _count_writes(operations)
    _count_torch(operations)


def _count_writes(operations: _Operations) -> None:
    real_open, real_fsync, real_write = io.open, os.fsync, os.write

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            view = memoryview(data).cast("B")
            operations.at(self.name)
            written = super().write(view[: len(view) // 2]) or 0
            operations.at(self.name)
            return written + (super().write(view[written:]) or 0)

    def counted_open(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
        newline: Any = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        writes = set(mode) & set("wax+")
        if not writes or isinstance(file, int) or not operations.is_below(file):
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if "b" in mode and buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        operations.at(number)
        real_fsync(number)
        operations.at(number)

    def write(descriptor: int, data: Any) -> int:
        operations.at(descriptor)
        return real_write(descriptor, data)

    io.open = builtins.open = counted_open  # type: ignore[assignment]
    os.fsync, os.write = fsync, write


def _count_torch(operations: _Operations) -> None:
    import torch

    writer = torch.serialization._open_zipfile_writer_file
    begin, end = writer.__init__, writer.__exit__

    def opened(self: Any, name: Any, *rest: Any) -> None:
        operations.at(name)
        begin(self, name, *rest)
        self.path = name
        operations.at(name)

    def closed(self: Any, *error: Any) -> None:
        operations.at(self.path)
        end(self, *error)
        operations.at(self.path)

    writer.__init__, writer.__exit__ = opened, closed


# --- hanging --------------------------------------------------------------------------------------


def stop_in(where: str, nth: int = 1, number: int = signal.SIGSTOP) -> None:
    """SIGSTOP, or another signal, of this rank at the n-th call of something.

    Args:
        where: "start": at once; "group": at the start of the process group; else a method of the
            engine.
    """
    if where == "start":
        os.kill(os.getpid(), number)
        return
    calls = 0

    def stopping(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), number)
        return call(*args, **kwargs)

    if where == "group":
        from torch.distributed import distributed_c10d

        begin = distributed_c10d.init_process_group
        replaced = functools.wraps(begin)(functools.partial(stopping, begin))
        for module in (distributed_c10d, sys.modules["torch.distributed"]):
            module.init_process_group = replaced  # type: ignore[attr-defined]
    else:
        _wrap_method(where, stopping)
