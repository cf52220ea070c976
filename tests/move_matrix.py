"""Runs that move from layout to layout, each beside one that stays, and the memory of a move.

    python tests/move_matrix.py                  all moves: minutes
    python tests/move_matrix.py --only replicas  those of one group

Results: docs/results/moves.json (every move) and moves.md (the table).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from moves import KINDS, STEPS, Layout, differing, joined, leg, losses_of
from ranks import close_ranks
from ranks import run_ranks as shared_results

RESULTS = Path(__file__).parents[1] / "docs" / "results"
LOCAL: dict[str, Any] = {"mode": "local"}
SECTIONS: dict[str, dict[str, Any]] = {
    "local": LOCAL,
    "backprop": {"mode": "backprop"},
    "chunked 2": {"mode": "chunked", "window": 2},
    "shifted chunks": {"mode": "shifted_chunked", "window": 2},
    "interlocking 2": {"mode": "interlocking", "window": 2},
    "overlapping 2": {"mode": "overlapping", "window": 2},
    "deep supervision": {"mode": "deep_supervision"},
    "mix": {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]},
    "run ahead": {"mode": "backprop", "run_ahead": "auto"},
    "rates by segment": {"mode": "local", "warmup_stagger": 2},
    "shared readout, tracked blocks": {
        "mode": "local",
        "head": {
            "readout": "shared", "blocks": 1, "blocks_from": "next_tracked", "refresh_every": 2,
        },
    },
    "periodic": {"mode": "local", "replicas": {"sync": "periodic", "every": 2}},
    "subnets": {"mode": "local", "replicas": {"sync": "subnets", "every": 2, "scale": "none"}},
}  # fmt: skip
PROMISES = {
    "bits": "the losses and every tensor of a run that never moved, to the bit",
    "own": "as bits, on each replica for itself",
    "rounding": "every weight and moment to the bit when it goes on; then losses within 1e-5 of a "
    "run that never moved, in bf16 within 1e-2",
    "state": "every fp32 weight and moment to the bit when it goes on",
    "heads": "as state, for layers and for the heads whose cut agrees",
    "merged": "all replicas go on from the mean of weights and moments",
}


def run_ranks(*arguments: Any, **settings: Any) -> list[Any]:
    """As the tests', with tensors of this process alone: shared ones keep a file open each."""
    return copy.deepcopy(shared_results(*arguments, **settings))


class Case(NamedTuple):
    group: str
    scheme: str
    before: Layout
    after: Layout
    promise: str
    total: int = 4  # micro-batches of a step


def cases() -> Iterator[Case]:
    whole = [Layout(1, 1, 4), Layout(2, 1, 2), Layout(4, 1, 1)]
    for kind in KINDS:
        for one, other in permutations(whole, 2):
            yield Case(
                "stages", "local", one._replace(kind=kind), other._replace(kind=kind), "bits"
            )
    for scheme in list(SECTIONS)[1:-2]:
        yield Case("schemes", scheme, whole[1], whole[2], "bits")
        yield Case("schemes", scheme, whole[2], whole[0], "bits")
    for kind in KINDS:
        one, two = Layout(2, 1, 2, kind), Layout(2, 2, 2, kind)
        yield Case("replicas", "local", one, two, "bits", 2)
        yield Case("replicas", "local", two, Layout(4, 1, 1, kind), "bits", 2)
        yield Case("replicas", "local", two, Layout(1, 4, 4, kind), "rounding")
    for a, b in permutations(KINDS, 2):
        yield Case("kinds", "local", Layout(2, 1, 2, a), Layout(1, 2, 4, b), "state")
    for one, other in permutations([Layout(4), Layout(3), Layout(1, 1, 2)], 2):
        yield Case("segments", "local", one, other, "heads")
    for scheme in ("periodic", "subnets"):
        yield Case("apart", scheme, Layout(1, 2, 4), Layout(2, 2, 2), "own")
        yield Case("apart", scheme, Layout(4, 2, 1), Layout(1, 2, 4), "own")
        yield Case("apart", scheme, Layout(2, 2, 2), Layout(4, 1, 1), "merged")


@cache
def before(scheme: str, layout: Layout, total: int) -> tuple[str, Any]:
    folder = tempfile.mkdtemp()
    steps = _steps(scheme)
    return folder, run_ranks(
        leg, layout.ranks, folder, layout, SECTIONS[scheme], steps=steps, total=total
    )  # fmt: skip


@cache
def stays(scheme: str, layout: Layout, total: int) -> Any:
    steps = _steps(scheme) + STEPS
    folder = tempfile.mkdtemp()
    return run_ranks(
        leg, layout.ranks, folder, layout, SECTIONS[scheme], steps=steps, total=total, save=False
    )  # fmt: skip


def _steps(scheme: str) -> int:
    return 7 if "tracked" in scheme else STEPS  # until copies are on their way


def exact(tensors: dict[Any, Any]) -> dict[Any, Any]:
    """Weights as exactly as they are known, and all else."""
    found = {at: values for at, values in tensors.items() if at[1] != "masters"}
    return found | {(n, "weights"): v for (n, key), v in tensors.items() if key == "masters"}


def play(case: Case) -> dict[str, Any]:
    folder, saved = before(case.scheme, case.before, case.total)
    began = time.perf_counter()
    result = run_ranks(
        leg, case.after.ranks, folder, case.after, SECTIONS[case.scheme], resume=True,
        total=case.total, save=False,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    straight = stays(case.scheme, case.before, case.total)
    mine, theirs = losses_of(result), losses_of(straight)
    loss = max((abs(mine[at] - theirs[at]) for at in mine.keys() & theirs.keys()), default=0.0)
    loaded, end = state_bits(case, saved, result), end_bits(case, straight, result)
    if case.promise in ("bits", "own"):
        right = not loaded and not end and loss == 0.0
    else:
        limit = 1e-2 if "bf16" in case.after.kind else 1e-5
        right = not loaded and (case.promise != "rounding" or loss <= limit)
    return {
        **case._asdict(), "before": str(case.before), "after": str(case.after),
        "tensors": len(joined(result, "loaded")), "loaded_differ": len(loaded),
        "end_differ": len(end), "loss_difference": loss, "right": right,
        "seconds": round(seconds, 2), "said": result[0]["moved"],
    }  # fmt: skip


def state_bits(case: Case, saved: Any, result: Any) -> list[Any]:
    """What is not as it was saved, when training goes on."""
    if case.promise == "own":
        return []  # each replica's own weights are compared at the end
    if case.promise == "merged":
        return _far_from_the_mean(saved, result)
    old, new = exact(joined(saved)), exact(joined(result, "loaded"))
    if case.promise == "heads":
        both = {name for name, _ in old} & {name for name, _ in new if (name, "exp_avg") in new}
        return differing(*({at: v for at, v in one.items() if at[0] in both} for one in (old, new)))
    return differing(old, new)


def _far_from_the_mean(saved: Any, result: Any) -> list[Any]:
    if len({one["replica"] for one in saved}) == 1:
        return []
    of_replica = [
        {at: v for one in saved if one["replica"] == r for at, v in one["left"].items()}
        for r in (0, 1)
    ]
    wrong = []
    for one in result:
        for at, values in one["loaded"].items():
            shapes = {of_replica[r][at].shape for r in (0, 1)}
            if shapes != {values.shape}:
                continue  # dealt out: each had a part
            mean = (of_replica[0][at] + of_replica[1][at]) / 2
            if not torch.allclose(values, mean, rtol=1e-5, atol=1e-7):
                wrong.append(at)
    return wrong


def end_bits(case: Case, straight: Any, result: Any) -> list[Any]:
    if case.promise != "own":
        return differing(joined(straight), joined(result))
    return [
        (r, at)
        for r in (0, 1)
        for at in differing(
            *(
                {at: v for one in run if one["replica"] == r for at, v in one["left"].items()}
                for run in (straight, result)
            )
        )
    ]


# --- memory ---------------------------------------------------------------------------------------

BIG = {"n_layer": 8, "n_embd": 512, "n_head": 8, "vocab_size": 8192}


def big(folder: str, stages: int, load: bool) -> dict[str, float]:
    """MiB of this rank: its share of weights and moments, and what loading added at most."""
    import threading

    import jobs

    engine = jobs.build({"mode": "local", "segments_per_stage": 4 // stages}, stages, model=BIG)
    weights = sum(p.numel() * p.element_size() for p in engine.module.parameters())
    peak, done, start = [0], threading.Event(), anonymous()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    if load:
        thread = threading.Thread(target=watch)
        thread.start()
        engine.load_checkpoint(folder)
        done.set()
        thread.join()
    else:
        data = jobs.batches(engine)
        engine.train_batch(data)
        engine.save_checkpoint(folder)
    mib = 1 << 20
    return {
        "share": 3 * weights / mib, "moments": 2 * weights / mib,
        "added": (peak[0] - start) / mib, "kept": (anonymous() - start) / mib,
    }  # fmt: skip


def anonymous() -> int:
    """Bytes that this process holds beside mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def memory() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        (saved,) = run_ranks(big, 1, folder, 1, False)
        loaded = run_ranks(big, 4, folder, 4, True)
    return {"whole": saved["share"], "ranks": loaded}


# --- results --------------------------------------------------------------------------------------


def write(rows: list[dict[str, Any]], held: dict[str, Any]) -> None:
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"2-core {platform.machine()} container",
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
    }
    text = json.dumps({**about, "moves": rows, "memory_mib": held}, indent=1)
    (RESULTS / "moves.json").write_text(text + "\n")
    (RESULTS / "moves.md").write_text("\n".join(page(rows, held, about)) + "\n")


def page(rows: list[dict[str, Any]], held: dict[str, Any], about: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    yield "# Moves from layout to layout\n\n<!-- written by `python tests/move_matrix.py` -->\n"
    yield (
        f"{STEPS} steps of a tiny GPT-2 on one layout, a save, and {STEPS} more on another, beside "
        "a run that stays on the first. A layout is stages x replicas, segments on each stage, "
        "precision and ZeRO stage. Every row, with its figures, is in [moves.json](moves.json). "
        f"{about['date']}, {about['machine']}, {versions}.\n"
    )
    yield from (f"- **{name}**: {promise}." for name, promise in PROMISES.items())
    wrong = [row for row in rows if not row["right"]]
    yield f"\n{len(rows)} moves, {len(rows) - len(wrong)} as promised.\n"
    yield "| scheme | from | to | promise | tensors | largest difference of a loss | kept |"
    yield "|---|---|---|---|---:|---:|---|"
    for row in rows:
        yield (
            f"| {row['scheme']} | {row['before']} | {row['after']} | {row['promise']} | "
            f"{row['tensors']} | {row['loss_difference']:.2g} | {'yes' if row['right'] else 'no'} |"
        )
    yield "\n## Memory\n"
    ranks = held["ranks"]
    yield (
        f"A model whose weights and moments take {held['whole']:.0f} MiB in fp32 moves from 1 "
        "stage to 4: largest growth of each process's own memory during `load_checkpoint`, which "
        "makes the moments. Files that are mapped do not count; the kernel takes them back.\n"
    )
    yield "| stage | weights and moments, MiB | moments | added at most | added for good |"
    yield "|---:|---:|---:|---:|---:|"
    for stage, one in enumerate(ranks):
        yield (
            f"| {stage} | {one['share']:.0f} | {one['moments']:.0f} | {one['added']:.0f} | "
            f"{one['kept']:.0f} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="a group: stages, schemes, replicas, kinds, segments, apart")
    args = parser.parse_args()
    rows = []
    for case in cases():
        if args.only in (None, case.group):
            rows.append(play(case))
            print(json.dumps(rows[-1]), flush=True)
    if args.only is None:
        write(rows, memory())
    close_ranks()
    wrong = [row for row in rows if not row["right"]]
    print(f"{len(rows)} moves, {len(wrong)} not as promised")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
