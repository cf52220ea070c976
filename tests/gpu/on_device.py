"""What ranks do in the tests of a device; imports are inside, since the ranks import this file."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jobs

# large enough that a block computes longer than a message is copied
WIDE = {"n_layer": 4, "n_embd": 1024, "n_head": 16, "n_positions": 512, "vocab_size": 4096}


def wide_batches(engine: Any, sequences: int = 8) -> Any:
    import torch

    if not engine.is_first_stage():
        return None

    def generate():
        generator = torch.Generator().manual_seed(0)
        while True:
            shape = sequences, WIDE["n_positions"]
            yield torch.randint(0, WIDE["vocab_size"], shape, generator=generator)

    return generate()


def places(section: dict[str, Any], stages: int) -> dict[str, Any]:
    """Where weights, moments and losses of a trained engine are."""
    import torch

    engine = jobs.build(section, stages)
    loss = engine.train_batch(jobs.batches(engine))
    tensors = [*engine.module.parameters()]
    tensors += [t for s in engine.basic_optimizer.state.values() for t in s.values()]
    return {
        "weights": {p.device.type for p in engine.module.parameters()},
        "loss": loss.device.type,
        "largest": max(tensors, key=torch.Tensor.numel).device.type,
        "backend": torch.distributed.get_backend(),
    }


def documents(batches: Any) -> Any:
    """Two in each sequence: positions start again in the middle."""
    import torch

    for ids in batches:
        half = torch.arange(ids.shape[1]) % (ids.shape[1] // 2)
        yield {"input_ids": ids, "position_ids": half.expand_as(ids).contiguous()}


def data_of(engine: Any, start: int, apart: bool) -> Any:
    data = jobs.batches(engine, start)
    return documents(data) if apart and data is not None else data


def save_halfway(
    folder: str, section: dict[str, Any], stages: int, apart: bool = False, **settings: Any
) -> Any:
    """Losses and weights of six steps, saved after the third.

    Args:
        apart: the data is of two documents a sequence.
    """
    engine = jobs.build(section, stages, **settings)
    data = data_of(engine, 0, apart)
    own = []
    for step in range(6):
        if step == 3:
            engine.save_checkpoint(folder)
        own.append(engine.train_batch(data).item())
    return own[3:], jobs.state_of(engine)


def go_on(
    folder: str, section: dict[str, Any], stages: int, apart: bool = False, **settings: Any
) -> Any:
    """The last three of these steps, by an engine that has loaded what was saved."""
    engine = jobs.build(section, stages, **settings)
    engine.load_checkpoint(folder)
    data = data_of(engine, 3, apart)
    return [engine.train_batch(data).item() for _ in range(3)], jobs.state_of(engine)


def memory(section: dict[str, Any], stages: int, steps: int, **settings: Any) -> list[int]:
    """Bytes of tensors on the device after a tenth of the steps, and after all."""
    import torch

    engine = jobs.build(section, stages, **settings)
    data = jobs.batches(engine)
    held = []
    for step in range(steps):
        engine.train_batch(data)
        if step + 1 in (steps // 10, steps):
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated())
    return held


def traced(section: dict[str, Any], stages: int, steps: int, **settings: Any) -> dict[str, Any]:
    """What the host and the device do in some steps.

    Returns:
        "waits": name -> how often the host waited for the device, in `steps` steps, by the thread
        that trains; "warned": where torch's own look-out saw it wait; "kernels" and "copies":
        (start, end) of each on the device, in microseconds, copies to and from the host alone.
    """
    import torch

    engine = jobs.build(section, stages, model=WIDE, **settings)
    data = wide_batches(engine)
    for _ in range(5):
        engine.train_batch(data)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(steps):
            engine.train_batch(data)
        torch.cuda.set_sync_debug_mode("default")
    warned = [f"{w.filename}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)]
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("these steps"):
            for _ in range(steps):
                engine.train_batch(data)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = _read(events)
    return {**found, "warned": warned}


def _read(events: list[dict[str, Any]]) -> dict[str, Any]:
    # the device's side of it, by the same name, is of another kind
    named = [e for e in events if e.get("name") == "these steps" and e.get("ph") == "X"]
    steps = next(e for e in named if e.get("cat") == "user_annotation")
    begin, end = steps["ts"], steps["ts"] + steps["dur"]
    waits: dict[str, int] = {}
    for event in events:
        inside = event.get("tid") == steps["tid"] and begin <= event.get("ts", 0) <= end
        if inside and "Synchronize" in event.get("name", ""):
            waits[event["name"]] = waits.get(event["name"], 0) + 1

    def spans(kind: str, *names: str) -> list[tuple[float, float]]:
        return [
            (event["ts"], event["ts"] + event["dur"])
            for event in events
            if event.get("cat") == kind and any(name in event["name"] for name in names or ("",))
        ]

    copies = spans("gpu_memcpy", "HtoD", "DtoH")
    return {"waits": waits, "kernels": spans("kernel"), "copies": copies}


def skip_one(stages: int) -> tuple[int, bool, list[float]]:
    """(steps left out, are all weights finite, own losses) of six steps; in the third a weight's
    gradient is not a number."""
    import torch

    section = {"mode": "local", "on_nonfinite": {"skip": 2}}
    engine = jobs.build(section, stages)
    data, losses = jobs.batches(engine), []
    weight = next(engine.module.parameters())
    poison = [0.0, 0.0, torch.nan, 0.0, 0.0, 0.0]
    weight.register_hook(lambda gradient: gradient + poison[engine.global_steps])
    for _ in poison:
        losses.append(engine.train_batch(data).item())
    finite = all(bool(p.isfinite().all()) for p in engine.module.parameters())
    return engine.skipped_steps, finite, losses
