"""The Markdown tables of each benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from ds_local.config import strict_json

Row = dict[str, Any]

MISSING = "-"


def merged(rows: Sequence[Row]) -> list[Row]:
    """Repetitions of the same thing from several files, taken together; sorted by size."""
    same: dict[str, Row] = {}
    for row in rows:
        key = strict_json.dumps(
            [row[name] for name in ("system", "schedule", "stages", "micro_batches", "link")]
        )
        times = same.get(key, {"repetitions": []})["repetitions"] + row["repetitions"]
        ideal, middle = row["efficiency"] * row["step_seconds"], median(times)
        same[key] = row | {
            "repetitions": times,
            "step_seconds": middle,
            "efficiency": ideal / middle,
            "efficiency_lowest": ideal / max(times),
            "efficiency_highest": ideal / min(times),
        }
    return sorted(same.values(), key=lambda row: (row["stages"], row["micro_batches"]))


def grid(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    cells = [list(map(str, head)), ["---"] * len(head), *(list(map(str, line)) for line in lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def pivot(
    rows: Sequence[Row],
    line: Callable[[Row], str],
    column: Callable[[Row], str],
    cell: Callable[[Row], str],
    title: str,
) -> str:
    """A table with a line for each value of `line` and a column for each value of `column`, in
    order of appearance."""
    columns = list(dict.fromkeys(map(column, rows)))
    cells = {(line(row), column(row)): cell(row) for row in rows}
    lines = dict.fromkeys(map(line, rows))
    return grid(
        [title, *columns],
        [[one, *(cells.get((one, c), MISSING) for c in columns)] for one in lines],
    )


def name_of(row: Row) -> str:
    return f"{row['system']} {row['schedule']}"


def percent(share: float | None, digits: int = 1) -> str:
    return MISSING if share is None else f"{100 * share:.{digits}f}"


def _efficiency(row: Row) -> str:
    """Median, in brackets lowest and highest, then the simulator's figure."""
    spread = f" ({percent(row['efficiency_lowest'], 0)}-{percent(row['efficiency_highest'], 0)})"
    simulated = row["simulated_efficiency"]
    return (
        percent(row["efficiency"])
        + spread
        + ("" if simulated is None else f" / {percent(simulated, 0)}")
    )


def schedule_tables(rows: Sequence[Row]) -> list[str]:
    place = list(map(name_of, rows))  # the order in which they ran
    by_size = merged(rows)
    tables = []
    for stages in dict.fromkeys(row["stages"] for row in by_size):
        own = [row for row in by_size if row["stages"] == stages]
        columns = list(dict.fromkeys(row["micro_batches"] for row in own))
        own.sort(key=lambda row: place.index(name_of(row)))
        cells = {(name_of(row), row["micro_batches"]): _efficiency(row) for row in own}
        lines = [
            [name, *(cells.get((name, m), MISSING) for m in columns)]
            for name in dict.fromkeys(map(name_of, own))
        ]
        tables.append(grid([f"P = {stages}", *(f"M = {m}" for m in columns)], lines))
    return tables


def link_tables(rows: Sequence[Row]) -> list[str]:
    rows = sorted(rows, key=lambda row: (row["link"]["c_over_f"], row["link"]["delay_seconds"]))

    def condition(row: Row) -> str:
        link = row["link"]
        delay = f"delay {1000 * link['delay_seconds']:g} ms"
        return delay if row["sweep"] == "delay" else f"c/F = {link['c_over_f']:g}"

    return [
        pivot(
            [r for r in rows if r["sweep"] == one],
            name_of,
            condition,
            _efficiency,
            f"P = {rows[0]['stages']}, M = {rows[0]['micro_batches']}",
        )
        for one in dict.fromkeys(row["sweep"] for row in rows)
    ]


def memory_tables(rows: Sequence[Row]) -> list[str]:
    def cells(row: Row) -> list[str]:
        live = ", ".join(f"{n:.1f}" for n in row["peak_live_micro_batches"])
        grown = ", ".join(f"{n / 2**20:.0f}" for n in row["rss_growth_bytes"])
        posted = f"{max(row['posted_receive_bytes']) / 2**20:.2f}"
        return [name_of(row), live, f"{max(row['live_bytes']) / 2**20:.1f}", grown, posted]

    head = [
        "live micro-batches by stage",
        "most live on a stage, MiB",
        "growth of the process by stage, MiB",
        "posted receives, MiB",
    ]
    settings = dict.fromkeys((r["stages"], r["micro_batches"]) for r in rows)
    return [
        grid(
            [f"P = {p}, M = {m}", *head],
            [cells(r) for r in rows if (r["stages"], r["micro_batches"]) == (p, m)],
        )
        for p, m in settings
    ]


def _columns(rows: Sequence[Row], names: dict[str, Callable[[Row], str]]) -> str:
    return grid(list(names), [[show(row) for show in names.values()] for row in rows])


def number(value: float | None, form: str = ".1f") -> str:
    return MISSING if value is None else format(value, form)


def _tokens(row: Row) -> str:
    lowest, highest = row["tokens_per_second_lowest"], row["tokens_per_second_highest"]
    return f"{row['tokens_per_second']:,.0f} ({lowest:,.0f}-{highest:,.0f})"


def _mebibytes(count: float | None) -> str:
    return MISSING if count is None else f"{count / 2**20:.0f}"


def real_tables(rows: Sequence[Row]) -> list[str]:
    speed = [r for r in rows if r["what"] == "speed"]
    quality = [r for r in rows if r["what"] == "time to loss"]
    tables = []
    if speed:
        tables.append(
            pivot(
                speed,
                name_of,
                lambda r: f"M = {r['micro_batches']}",
                _tokens,
                "tokens/s, median (lowest-highest)",
            )
        )
    if quality:
        tables.append(
            _columns(
                quality,
                {
                    "system": name_of,
                    "target loss": lambda r: f"{r['target_loss']:g}",
                    "seconds to it": lambda r: number(r["seconds"], ".0f"),
                    "steps": lambda r: number(r["steps"], ".0f"),
                    "loss at the end": lambda r: number(r["last_loss"], ".3f"),
                },
            )
        )
    return tables


def head_tables(rows: Sequence[Row]) -> list[str]:
    return [
        _columns(
            rows,
            {
                "head": lambda r: r["head"],
                "forward + backward, processor ms (lowest-highest)": lambda r: (
                    f"{1000 * r['seconds']:.0f} "
                    f"({1000 * r['seconds_lowest']:.0f}-{1000 * r['seconds_highest']:.0f})"
                ),
                "in blocks": lambda r: number(r["seconds"] / r["block_seconds"], ".2f"),
                "of a full head's time": lambda r: number(r["of_full_time"], ".3f"),
                "of its floating-point operations": lambda r: number(r["of_full_flops"], ".3f"),
                "saved for backward; growth of the process, MiB": lambda r: (
                    f"{_mebibytes(r['live_bytes'])}; {_mebibytes(r['rss_growth_bytes'])}"
                ),
                "trainable parameters, M": lambda r: number(r["parameters"] / 1e6, ".1f"),
            },
        )
    ]


def _ms(*names: str) -> Callable[[Row], str]:
    return lambda row: number(1000 * sum(row[name] for name in names), ".2f")


def _counts(row: Row) -> str:
    """Of tests."""
    dry = ", dry run" if row.get("dry_run") else ""
    return f"{row['passed']} passed, {row['failed']} failed{dry}"


def _block(row: Row) -> str:
    """What a head is compared with; in older rows always an eager one."""
    how = "compiled" if row.get("block_compiled") else "eager"
    return f"{1000 * row['block_seconds']:.2f} ms, {how}"


def gpu_tables(rows: Sequence[Row]) -> list[str]:
    def of(what: str) -> list[Row]:
        return [r for r in rows if r["what"] == what]

    def model(row: Row) -> str:
        return f"{row['model']}{', compiled' if row['compiled'] else ''}"

    def gibibytes(row: Row) -> str:
        count = row["peak_bytes"]
        return MISSING if count is None else number(count / 2**30, ".2f")

    def tokens(row: Row) -> str:
        return f"{row['tokens_per_second']:,.0f}"

    shapes: dict[str, dict[str, Callable[[Row], str]]] = {
        "whole model": {
            "model, one process": model,
            "tokens/s": tokens,
            "MFU %": lambda r: percent(r["useful_mfu"]),
            "peak GiB": gibibytes,
        },
        "engine": {
            "engine, one process": lambda r: f"{model(r)}: {r['schedule']}",
            "tokens/s": tokens,
            "peak GiB": gibibytes,
        },
        "stage": {
            "stage": lambda r: f"{model(r)}, {r['stage'] + 1} of {r['stages']}",
            "forward ms": _ms("forward"),
            "backward ms": _ms("input_grad", "weight_grad"),
            "head ms": _ms("head"),
            "update ms": _ms("optimizer"),
            "useful MFU %": lambda r: percent(r["useful_mfu"]),
            "peak GiB": gibibytes,
        },
        "tests": {
            "tests of a device": _counts,
            "seconds": lambda r: number(r["seconds"], ".0f"),
        },
        "study": {
            "study": lambda r: f"{r['preset']}: {r['method']}",
            "validation loss": lambda r: number(r["loss"], ".4f"),
            "tokens": lambda r: f"{r['tokens']:,}",
        },
        "head": {
            "head": lambda r: f"{r['model']}: {r['head']}",
            "forward + backward ms": _ms("seconds"),
            "in blocks": lambda r: number(r["seconds"] / r["block_seconds"], ".2f"),
            "a block": _block,
            "peak GiB": gibibytes,
        },
    }
    tables = [_columns(of(what), columns) for what, columns in shapes.items() if of(what)]
    if predicted := of("prediction"):
        line = lambda r: f"{model(r)}, P = {r['stages']}, {r['schedule']}"  # noqa: E731
        cell = lambda r: f"{percent(r['efficiency'], 0)} ({tokens(r)} tokens/s)"  # noqa: E731
        title = "predicted efficiency %"
        tables.append(pivot(predicted, line, lambda r: r["link"]["name"], cell, title))
    return tables


TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "schedules": schedule_tables,
    "links": link_tables,
    "memory": memory_tables,
    "real": real_tables,
    "heads": head_tables,
    "gpu": gpu_tables,
}
