"""Break real runs on purpose, and write down what came of it.

    python tests/faults/run.py                                 everything, at full length: hours
    python tests/faults/run.py kills --count 20 --seed 7       one campaign, shorter
    python tests/faults/run.py table                           only write the page from the rows there are

A half-done campaign goes on where it stopped: rows lie in runs/faults, and those of other code or
another seed do not count.
Results: docs/results/reliability.json (all rows) and reliability.md (the table).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import shutil
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fork_client import ROOT, Server
from workbench import Bench

# campaign -> cases of a full one
CAMPAIGNS = {
    "kills": 200,
    "saves": 400,
    "corruptions": 300,
    "nonfinite": 216,
    "settings": 200,
    "inputs": 88,
    "stops": 120,
    "fill": 40,
}
RESULTS = ROOT / "docs" / "results"


def main() -> int:
    # told to end, leave by way of everybody's tidying: small disks are unmounted, runs killed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "campaign", nargs="*", help=f"{', '.join(CAMPAIGNS)}; default all; or: table"
    )
    parser.add_argument("--count", type=int, help="cases of each campaign; default a full one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "faults", help="folder for rows and runs"
    )
    parser.add_argument("--fresh", action="store_true", help="do not go on with earlier rows")
    parser.add_argument(
        "--wrong", action="store_true", help="right rows of other code count; play all others"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folders of runs")
    args = parser.parse_args()
    chosen = args.campaign or list(CAMPAIGNS)
    unknown = set(chosen) - set(CAMPAIGNS) - {"table"}
    if unknown:
        parser.error(
            f"unknown campaign {', '.join(sorted(unknown))}; there are {', '.join(CAMPAIGNS)}"
        )
    args.work.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in chosen if name != "table"]
    wrong = sum(campaign(name, args) for name in chosen)
    write_results(args.work)
    return 1 if wrong else 0


def campaign(name: str, args: argparse.Namespace) -> int:
    """Play the cases that have no row yet; returns how many of all came out wrong."""
    module = importlib.import_module(name)
    path = args.work / f"{name}.jsonl"
    if args.fresh:
        path.unlink(missing_ok=True)
    code = code_version()
    done = {
        (row["seed"], row["number"]): row for row in rows_in(path)
        if row["code"] == code or (args.wrong and not row["wrong"])
    }  # fmt: skip
    stamp = args.work / name / "code.txt"
    if not stamp.exists() or stamp.read_text() != code:  # what is kept there is of other code
        shutil.rmtree(args.work / name, ignore_errors=True)
    (args.work / name).mkdir(exist_ok=True)
    stamp.write_text(code)
    with Server(args.work / name) as server:
        bench = Bench(server, args.work / name)
        more = {"bench": bench} if name == "saves" else {}  # its cases depend on the code
        cases = module.cases(args.seed, args.count or CAMPAIGNS[name], **more)
        played = {
            n: json.dumps(row["case"]) for (seed, n), row in done.items() if seed == args.seed
        }
        still = [n for n, case in enumerate(cases) if played.get(n) != json.dumps(case)]
        print(
            f"{name}: {len(cases)} cases, {len(cases) - len(still)} of them played already",
            flush=True,
        )
        wrong = sum(bool(done[args.seed, n]["wrong"]) for n in set(range(len(cases))) - set(still))
        for number in still:
            outcome = bench.play(module.play, cases[number], number, args.keep)
            row = {
                "campaign": name, "seed": args.seed, "number": number, "case": cases[number], "wrong": outcome.wrong,
                "said": outcome.said, "seconds": round(outcome.seconds, 2), "code": code,
            }  # fmt: skip
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            wrong += bool(outcome.wrong)
            said = " ".join("; ".join(outcome.wrong).split())
            print(
                f"{name} {number} {json.dumps(cases[number])}: {said[-400:] or 'right'}", flush=True
            )
    return wrong


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def code_version() -> str:
    """Of the package, its scripts and this harness."""
    digest = hashlib.sha256()
    for folder in ("ds_local", "scripts", "tests/faults"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def write_results(work: Path) -> None:
    """reliability.json and reliability.md, from the newest row of each case."""
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    for name in CAMPAIGNS:
        for row in rows_in(work / f"{name}.jsonl"):
            rows[name, row["seed"], row["number"]] = row
    if not rows:
        return
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
        "campaigns": {
            name: summary(name, [r for r in rows.values() if r["campaign"] == name])
            for name in CAMPAIGNS
        },
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row).replace(str(work), "WORK") for row in rows.values()]
    text = json.dumps(facts, indent=1)[:-2] + ',\n "rows": [\n' + ",\n".join(lines) + "\n]}\n"
    (RESULTS / "reliability.json").write_text(text)
    (RESULTS / "reliability.md").write_text(page(facts, list(rows.values())))


def summary(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    wrong = sum(bool(row["wrong"]) for row in rows)
    return {
        "cases": len(rows), "right": len(rows) - wrong, "wrong": wrong,
        "slowest_seconds": max((row["seconds"] for row in rows), default=None),
        "command": f"python tests/faults/run.py {name}",
        "code": sorted({row["code"] for row in rows}),
        "what": importlib.import_module(name).__doc__,
    }  # fmt: skip


def page(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    table = "\n".join(
        f"| {name} | {one['cases']} | {one['right']} | {one['wrong']} | {one['slowest_seconds']} | "
        f"`{one['command']}` |"
        for name, one in facts["campaigns"].items() if one["cases"]
    )  # fmt: skip
    played = {name: one for name, one in facts["campaigns"].items() if one["cases"]}
    meaning = "\n".join(
        f"**{name}.** {' '.join(one['what'].split())}\n" for name, one in played.items()
    )
    wrong = [row for row in rows if row["wrong"]]
    listed = "\n".join(
        f"- {row['campaign']} {row['number']}, seed {row['seed']}: {'; '.join(row['wrong'])[:300]}"
        for row in wrong
    )
    codes = {code for one in played.values() for code in one["code"]}
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return f"""# Reliability

<!-- written by `python tests/faults/run.py` -->

Real runs of `scripts/train.py` (a tiny GPT-2, gloo), broken on purpose with seeds. A case is right when everything holds that
its campaign asks for. Every row, with its case, is in [reliability.json](reliability.json).

| campaign | cases | right | wrong | slowest answer, s | command |
| --- | ---: | ---: | ---: | ---: | --- |
{table}

{facts["date"]}, {facts["machine"]}, {versions}. Rows come from {len(codes)} states of the code: what was wrong has
been played again after it was mended (`--wrong`), what was right has not.

## What the campaigns ask for

{meaning}
## What is wrong

{listed or "Nothing."}
"""


if __name__ == "__main__":
    sys.exit(main())
