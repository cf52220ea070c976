"""ds_local.json: what a checkpoint says about itself, checked before anybody believes it.

No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ds_local.config.files import local_parallel, models_in
from ds_local.config.schema import LocalParallelConfig
from ds_local.config.strict import SECTION
from ds_local.errors import CheckpointError, ConfigError

FACTS = "ds_local.json"
FORMAT = 2
_SINCE_2 = ("optimizer", "scheduler", "seal")  # keys that format 1 does not have


class OptimizerFacts(BaseModel):
    """What the optimizer's state is like."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: str
    precision: Literal["fp32", "bf16"]
    zero_stage: NonNegativeInt


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Annotated[int, Field(ge=1, le=FORMAT)]
    step: NonNegativeInt
    unit: NonNegativeInt | None = None  # of the pipeline, if it is of one alone
    num_stages: PositiveInt
    num_replicas: PositiveInt
    segment_parts: list[NonNegativeInt]
    head_segments: list[NonNegativeInt] | None = None
    segment_stages: list[NonNegativeInt] | None = None  # None: in order
    local_parallel: dict[str, Any]
    model: dict[str, Any] | None
    optimizer: OptimizerFacts | None = None
    scheduler: str | None = None  # its class
    files: dict[str, tuple[NonNegativeInt, str]]  # name -> (bytes, SHA-256)
    seal: str | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> _Facts:
        missing = [key for key in _SINCE_2 if key not in self.model_fields_set]
        if self.format >= 2 and (missing or self.head_segments is None):
            raise ValueError(f"lacks {', '.join(missing) or 'head_segments'}")
        if self.format < 2 and len(missing) < len(_SINCE_2):
            raise ValueError(f"format {self.format} has no such key as {_SINCE_2}")
        parts, segments = self.segment_parts, len(self.segment_parts) - 1
        if segments < 1 or parts[0] or any(a >= b for a, b in pairwise(parts)):
            raise ValueError(f"segment_parts must rise from 0, got {parts}")
        if segments % self.num_stages or max(self.head_segments or [0]) > segments - 1:
            raise ValueError(
                f"{segments} segments do not go with {self.num_stages} stages and heads at "
                f"{self.head_segments}"
            )
        dealt = sorted(self.segment_stages or _in_order(self.model_dump()))
        if dealt != _in_order(self.model_dump()):
            raise ValueError(f"segment_stages gives stages unlike segments: {self.segment_stages}")
        strange = [name for name in self.files if Path(name).name != name or name == FACTS]
        if strange:
            raise ValueError(f"files names {strange[0]!r}, which is no file of a checkpoint")
        return self


def _in_order(facts: Mapping[str, Any]) -> list[int]:
    """Stage of each segment, where no schedule deals them otherwise."""
    count = len(facts["segment_parts"]) - 1
    return [segment * facts["num_stages"] // count for segment in range(count)]


def segments_of_stages(facts: Mapping[str, Any]) -> list[list[int]]:
    """The segments of each stage of a checkpoint."""
    stages = facts["segment_stages"] or _in_order(facts)
    return [
        [segment for segment, at in enumerate(stages) if at == stage]
        for stage in range(facts["num_stages"])
    ]


def write_facts(facts: Mapping[str, Any]) -> str:
    """The text of ds_local.json."""
    facts = {"format": FORMAT, **facts}
    return json.dumps({**facts, "seal": _seal(facts)}, indent=1) + "\n"


def read_facts(checkpoint: str | Path) -> dict[str, Any]:
    """What ds_local.json says about a checkpoint folder; options that it does not know yet have
    their defaults.

    Raises:
        CheckpointError: when it is missing, malformed, edited or of another format, or the
            checkpoint is another program's.
    """
    path = Path(checkpoint, FACTS)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(whose(path.parent) or f"cannot read {path}: {error}") from error
    try:
        found = _Facts.model_validate_json(text)
        given = _given(found.local_parallel, LocalParallelConfig)
        section = local_parallel({SECTION: given}).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
        raise CheckpointError(
            f"{path} is not what ds_local writes: {where + ': ' if where else ''}{what}; use "
            "another checkpoint, or the version that wrote it"
        ) from None
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    facts = {**found.model_dump(), SECTION: section}
    if found.format >= 2 and found.seal != _seal(json.loads(text)):
        raise CheckpointError(
            f"{path} was changed since it was written, its seal does not fit; use another "
            "checkpoint"
        )
    return facts


def _given(dump: Any, model: type[BaseModel]) -> Any:
    """A dumped section as a user would write it: what has its default is left out, since some
    options may be given only beside others."""
    if isinstance(dump, list):
        return [_given(entry, model) for entry in dump]
    if not isinstance(dump, dict):
        return dump
    defaults, given = model().model_dump(mode="json"), {}
    for key, value in dump.items():
        if key not in defaults or value != defaults[key]:
            inner = models_in(model.model_fields[key].annotation) if key in defaults else []
            given[key] = _given(value, inner[0]) if inner else value
    return given


def _seal(facts: Mapping[str, Any]) -> str:
    """Hash of what the facts say, but for the files' sums, which seal themselves."""
    said = {key: value for key, value in facts.items() if key != "seal"}
    said["files"] = sorted(facts["files"])
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def whose(folder: Path) -> str | None:
    """Of a folder without ds_local.json: the program that wrote it and what to do with it, in a
    sentence; None when it does not show."""
    if next(folder.glob("layer_*-model_states.pt"), None):
        return (
            f"{folder} is a checkpoint of DeepSpeed's own PipelineEngine, not of ds_local; take "
            f"its weights with module.load_state_dir({str(folder)!r}) before ds_local.initialize"
        )
    if next(folder.glob("*mp_rank_*_states.pt"), None):
        return (
            f"{folder} is a checkpoint of DeepSpeed without pipeline stages, not of ds_local; "
            "write its weights as a Hugging Face folder and start from that"
        )
    if (folder / "config.json").is_file():
        return f"{folder} is a Hugging Face folder, not a checkpoint; start from it as the model"
    return None


# --- what the optimizer's state depends on ------------------------------------------------------

_HEAD_OPTIONS = (
    "blocks",
    "blocks_from",
    "readout",
    "rank",
    "adapter",
    "temperature",
)


def head_options(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the tensors of an auxiliary head depend on."""
    head = facts[SECTION]["head"]
    return {
        **{key: head[key] for key in _HEAD_OPTIONS},
        "vocabulary": classes_of(facts),
        "companion": bool(head["companion"]),
    }


def classes_of(facts: Mapping[str, Any]) -> int | None:
    """Tokens with a class of their own in the auxiliary heads of a checkpoint; None: all."""
    head = facts.get(SECTION, {}).get("head", {})
    return None if head.get("rare_samples") else head.get("vocabulary")


def layout_changes(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is another in a run than in a checkpoint: name -> (theirs, ours). What a checkpoint does
    not say is taken to be the same."""
    theirs, ours = _layout(saved), _layout(own)
    return {
        name: (theirs[name], ours[name])
        for name in ours
        if theirs[name] is not None and theirs[name] != ours[name]
    }


def changes_in_words(changes: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {theirs}, now {ours}" for name, (theirs, ours) in changes.items())


def _layout(facts: Mapping[str, Any]) -> dict[str, Any]:
    section, optimizer = facts[SECTION], facts["optimizer"] or {}
    schemes, dealt = [section, *(section["phases"] or ())], facts.get("segment_stages")
    by_segment = section["lr_multipliers"] or section["warmup_stagger"]
    by_segment = by_segment or any(scheme.get("delay_discount") for scheme in schemes)
    return {
        "stages": facts["num_stages"],
        "replicas": facts["num_replicas"],
        "segments": len(facts["segment_parts"]) - 1,
        "cut": facts["segment_parts"],
        "placement": "in order" if dealt in (None, _in_order(facts)) else dealt,
        "heads at segments": facts["head_segments"],
        **{f"head.{key}": value for key, value in head_options(facts).items()},
        "learning rates": "by segment" if by_segment else "of one kind",
        "optimizer": optimizer.get("type"),
        "precision": optimizer.get("precision") or _precision(facts),
        "ZeRO stage": optimizer.get("zero_stage"),
    }


def _precision(facts: Mapping[str, Any]) -> str:
    return "bf16" if any(name.startswith("bf16_") for name in facts["files"]) else "fp32"
