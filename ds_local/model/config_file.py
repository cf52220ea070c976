"""Reading a Hugging Face model config: from where, and whether its keys are keys of its class.

A config class takes any key as an attribute, so a misspelt one leaves the default in force without
a word. A key that the class does not know is refused when it resembles one that it knows and the
file does not give; anything further off is left alone.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ds_local.config import shipped
from ds_local.config.deepspeed import check_number
from ds_local.config.files import check_finite, leaves, read_json
from ds_local.errors import ConfigError, UnsupportedModel, first_line

# what different families call the same thing
_SAME = (
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"),
    ("hidden_size", "n_embd", "n_embed", "d_model", "hidden_dim", "model_dim", "dim"),
    ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    ("num_key_value_heads", "n_kv_heads", "num_kv_heads"),
    ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "intermediate_dim"),
    ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "block_size"),
)
_SENSES = {"text_config", "vision_config", "audio_config", "audio_encoder"}
_UNLIMITED = ("time_step_limit",)  # of state-space models: Infinity is their default
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "n_inner",
    "max_position_embeddings",
)


def read_config(
    source: str | Path | dict[str, Any] | PretrainedConfig,
) -> tuple[PretrainedConfig, str]:
    """(a Hugging Face config, what to call it), from a JSON file, the name of a shipped one, a
    model folder, a hub name, a dict or a config.

    Raises:
        UnsupportedModel: when it cannot be read, or is of no causal language model.
        ConfigError: for a key that only resembles a real one, and sizes that are none.
    """
    if isinstance(source, PretrainedConfig):
        fields, where = source.to_dict(), "the model config"
    else:
        fields, where = _fields(source)
        fields = decoded(fields)
    model_type = fields["model_type"]
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModel(
            f"{where}: transformers {transformers.__version__} has no causal language model of "
            f"model_type {model_type!r}; supported are those in docs/models.md, such as gpt2, "
            "llama, mistral, qwen3 and gemma2"
        )
    cls: Any = CONFIG_MAPPING[model_type]
    if _SENSES & cls.sub_configs.keys():
        raise UnsupportedModel(
            f"{where}: a {model_type} holds more than a language model; give its text_config, if "
            "it has one"
        )
    check_finite({k: v for k, v in fields.items() if k not in _UNLIMITED}, where)
    for key in {*SIZES, *map(cls.attribute_map.get, SIZES)} & fields.keys():
        if fields[key] is not None and not isinstance(fields[key], list):  # of layers, say
            check_number(f"{where}: {key}", fields[key])
    if isinstance(source, PretrainedConfig):
        config = copy.deepcopy(source)
    else:
        try:
            config = AutoConfig.for_model(**fields)
        except (
            Exception
        ) as error:  # of huggingface_hub's strict dataclasses, which is no ValueError
            raise ConfigError(f"{where}: {last_line(error)}") from error
        _check_keys(fields, config, where)
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{where}: a {model_type} has an encoder, which cannot be trained")
    _check_heads(config, where)
    return config, where


def decoded(fields: Any) -> Any:
    """The fields with infinite numbers as such, which Hugging Face writes as objects."""
    if isinstance(fields, dict):
        if fields.keys() == {"__float__"}:
            return float(fields["__float__"])
        return {key: decoded(value) for key, value in fields.items()}
    return [decoded(value) for value in fields] if isinstance(fields, list) else fields


def reason(error: BaseException, config: PretrainedConfig) -> str:
    """Why no model can be made of a config."""
    if isinstance(error, KeyError):  # of a table of activations, say
        named = (path for path, value in leaves(config.to_dict()) if value == error.args[0])
        return f"{'.'.join(next(named, ('a key',)))} is {error}, which Hugging Face does not know"
    return last_line(error)


def last_line(error: BaseException) -> str:
    """What a nested error of Hugging Face comes to."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return text.split("Error: ")[-1].strip(" .!")


def _fields(source: str | Path | dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(the keys of a config, what to call it)."""
    if isinstance(source, dict):
        if not isinstance(source.get("model_type"), str):
            raise UnsupportedModel('the model config has no model_type; add one, such as "gpt2"')
        return source, "the model config"
    path = shipped.find(source)
    if path.is_file():
        try:
            fields = read_json(path)
        except ConfigError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise UnsupportedModel(f"{path} is no Hugging Face model config: {error}") from error
        if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
            raise UnsupportedModel(
                f'{path} is not a Hugging Face model config with a model_type, such as "gpt2"'
            )
        return fields, str(path)
    if not path.is_dir() and (
        path.is_absolute() or path.suffix == ".json" or str(source).count("/") > 1
    ):
        raise UnsupportedModel(
            f"no model config at {path}; give a config.json, a model folder, a hub name or one of "
            f"{', '.join(shipped.MODELS)}"
        )
    try:
        fields = PretrainedConfig.get_config_dict(str(source))[0]
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"cannot read a model config from {source!r}: {first_line(error)}"
        ) from error
    if "model_type" not in fields:
        raise UnsupportedModel(f"{source} has no config.json with a model_type")
    return fields, str(source)


def _check_keys(fields: Mapping[str, Any], config: PretrainedConfig, where: str) -> None:
    known = {key for key in vars(type(config)()) if not key.startswith("_")}
    known |= set(config.attribute_map)
    for key, value in fields.items():
        # what Hugging Face turned into something else is no attribute any more
        if key in known or key.startswith("_") or value in (None, False) or key not in vars(config):
            continue
        meant = _resembled(key, known)
        given = {meant, config.attribute_map.get(meant, meant)} if meant else set()
        if meant and not given & fields.keys():
            raise ConfigError(
                f"{where}: {key!r} is not a key of a {config.model_type} config; did you mean "
                f"{config.attribute_map.get(meant, meant)!r}?"
            )


def _resembled(key: str, known: set[str]) -> str | None:
    """The known key that this one may have been meant for."""
    for names in _SAME:
        if key in names and known & set(names):
            return next(name for name in names if name in known)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    return close[0] if close else None


def _check_heads(config: PretrainedConfig, where: str) -> None:
    """Where a family does not look at this itself it rounds, or fails in the first forward pass."""
    name = config.attribute_map.get
    try:
        heads, width = config.num_attention_heads, config.hidden_size
        groups, head_dim = (getattr(config, k, None) for k in ("num_key_value_heads", "head_dim"))
    except Exception:  # no attention, or other sizes in every block
        return
    if not isinstance(heads, int) or not isinstance(width, int):
        return
    if head_dim is None and width % heads:
        raise ConfigError(
            f"{where}: {name('hidden_size', 'hidden_size')} is {width}, no multiple of "
            f"{name('num_attention_heads', 'num_attention_heads')}, {heads}; change one of them"
        )
    if isinstance(groups, int) and groups and heads % groups:
        raise ConfigError(
            f"{where}: num_attention_heads is {heads}, no multiple of num_key_value_heads, "
            f"{groups}; change one of them"
        )
