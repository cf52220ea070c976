"""What differs between a run and the start that would continue it, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ds_local.config.deepspeed import batch_sizes
from ds_local.config.files import local_parallel
from ds_local.config.strict import SECTION
from ds_local.errors import ConfigError

# keys of the section that change no figure, or that the checkpoint itself is checked for
_FREE = (
    "seed",
    "num_stages",
    "segments_per_stage",
    "partition",
    "parts",
    "layout",
    "split_backward",
    "schedule",
    "compile",
    "async_save",
    "diagnostics",
    "ema",
)

_FREE_OF_LINKS = (
    "depth",
    "warn_seconds",
    "transfer",
    "timeout_seconds",
    "reconnect_seconds",
    "past_host",
)

_COMPARED = (
    SECTION,
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)

UNKNOWN = "unknown"


def by_kind(facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What run.json says, by the kind of change that it would be."""
    config, data = dict(facts.get("config") or {}), dict(facts.get("data") or {})
    replicas = (facts.get("layout") or {}).get("replicas", 1)
    try:
        section = local_parallel(config).model_dump(mode="json")
        size, count = batch_sizes(config, replicas)
        sizes = {"sequences of a step": size * count * replicas}
        if _counts_micro_batches(section):
            sizes["micro-batches"] = count
    except ConfigError:  # of another version
        section, sizes = {}, {}
    settings = {key: value for key, value in config.items() if key not in _COMPARED}
    return {
        **_of_section(section),
        "model": dict(facts.get("model") or {}),
        "data": {key: data.get(key, UNKNOWN) for key in ("fingerprint", "seq_len")},
        "tokenizer": {"fingerprint": data.get("tokenizer_fingerprint")},
        "batch": sizes,
        "settings": flat(settings),
    }


def of_checkpoint(facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What ds_local.json knows of the same."""
    return {
        **_of_section(facts[SECTION]),
        "model": dict(facts["model"] or {}),
        "data": {"fingerprint": UNKNOWN},
        "tokenizer": {"fingerprint": None},
        "batch": {"sequences of a step": UNKNOWN},
        "settings": {},  # not known either; only said where they are
    }


def _counts_micro_batches(section: Mapping[str, Any]) -> bool:
    """Does a mix give so many of a step's micro-batches to one of its modes?"""
    return any(scheme.get("mix") for scheme in (section, *(section["phases"] or ())))


def _of_section(section: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    scheme = {key: value for key, value in section.items() if key not in _FREE}
    if "link" in scheme:
        links = scheme["link"].items()
        scheme["link"] = {key: value for key, value in links if key not in _FREE_OF_LINKS}
    return {"seed": {"seed": section.get("seed", UNKNOWN)}, "scheme": flat(scheme)}


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested settings by their full names: "optimizer.params.lr" -> 0.002."""
    if not isinstance(value, Mapping):
        return {path: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{path}.{key}" if path else str(key))
    return found


# of the model's config: what versions and file formats write there
_NOT_THE_MODEL = ("transformers_version", "architectures", "torch_dtype", "dtype", "use_cache")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (old value, new value). What only one version of a package knows is no difference."""
    names = [name for name in new if name in old and name not in _NOT_THE_MODEL]
    return {
        name: (old[name], new[name]) for name in names if _plain(old[name]) != _plain(new[name])
    }


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def in_words(changes: Mapping[str, tuple[Any, Any]]) -> str:
    shown = [f"{name} {_short(a)}, now {_short(b)}" for name, (a, b) in list(changes.items())[:4]]
    more = len(changes) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
