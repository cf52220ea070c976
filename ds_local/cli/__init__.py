"""The commands: `ds-local VERB`, `python -m ds_local VERB`, or scripts/*.py in a checkout.

Each module here holds one verb: its arguments, and what to call with them.
"""

from __future__ import annotations

import importlib
import sys

import ds_local

# verb -> (module in this room, what it does)
VERBS = {
    "prepare": ("prepare", "text -> tokens -> a data folder"),
    "train": ("train", "train a model; start it with deepspeed or torchrun"),
    "simulate": ("simulate", "what a schedule will do, before running it"),
    "plan": ("plan", "which layout of a cluster is fastest"),
    "check": ("check", "are all machines ready for a job?"),
    "gather": ("gather", "checkpoints of units -> one of the whole pipeline"),
    "export": ("export", "a run -> a Hugging Face folder"),
    "evaluate": ("evaluate", "loss of a model and of each of its exits"),
    "generate": ("generate", "continue a text"),
    "summarize": ("summarize", "what came of a run"),
    "report": ("report", "the same as a page, of several runs too"),
    "benchmark": ("benchmark", "beside other pipelines: speed and memory"),
    "study": ("study", "methods on equal tokens: what they cost in quality"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] in (["--version"], ["-V"]):
        print(f"ds_local {ds_local.__version__}")
        return 0
    if arguments[:1] in ([], ["-h"], ["--help"]) or arguments[0] not in VERBS:
        known = bool(arguments) and arguments[0] in ("-h", "--help")
        if arguments and not known:
            print(f"{arguments[0]!r} is not a command", file=sys.stderr)
        verbs = "\n".join(f"    {verb:<10} {what}" for verb, (_, what) in VERBS.items())
        usage = f"usage: ds-local VERB ...; ds-local VERB --help says more\n\n{verbs}"
        print(usage, file=sys.stdout if known else sys.stderr)
        return 0 if known else 2
    sys.argv[0] = f"ds-local {arguments[0]}"  # for help and sentences
    verb = importlib.import_module(f"ds_local.cli.{VERBS[arguments[0]][0]}")
    code: int = verb.main(arguments[1:])
    return code


def command() -> None:
    """The console command: `main`, ended as every command of ours ends."""
    from ds_local.cli.ending import run

    run(main)
