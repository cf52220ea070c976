"""Write docs/configuration.md and configs/local_parallel.schema.json from the config classes.

python scripts/config_reference.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ds_local.config import schema as config
from ds_local.config.files import models_in
from ds_local.config.scheme import Row
from ds_local.config.strict import SECTION, Strict
from ds_local.outputs import write_file

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
SCHEMA = ROOT / "configs" / "local_parallel.schema.json"
HEADER = """# Configuration

<!-- written by `python scripts/config_reference.py` from the classes in ds_local/config;
change the docstrings there -->

How a model is trained is in `ds_config.json`; what is trained, and where to, is on the command line
([migrating](migrating.md)). K is the number of segments: stages x segments_per_stage.

- DeepSpeed's own keys mean what they mean in DeepSpeed. What a pipeline of DeepSpeed 0.19 cannot do
  correctly is refused at start with the reason, and so are misspelt keys, unknown parameters and
  values of another kind.
- `scheduler` may also name `WSD` (or `WarmupStableDecayLR`), which DeepSpeed lacks: the rate rises
  over `warmup_num_steps`, stays, and falls in a line over the last `decay_num_steps` (a fifth) of
  `total_num_steps`, to `decay_min_ratio` (0) of it.
- Our section is `"local_parallel"`, for example `{"mode": "chunked", "window": 2}`
  ([by name](schemes.md)); a key it does not know is an error that names the nearest one.
- Editors complete and check the section by [a JSON schema](../configs/local_parallel.schema.json):
  write `"$schema": "configs/local_parallel.schema.json"` at the top of the file.
"""


def sections() -> list[tuple[str, type[BaseModel]]]:
    """(path, class) of every table, the section itself first."""
    found: list[tuple[str, type[BaseModel]]] = []

    def visit(path: str, model: type[BaseModel]) -> None:
        found.append((path, model))
        for name, info in model.model_fields.items():
            for inner in models_in(info.annotation):
                visit(f"{path}.{name}" + ("[]" if "tuple" in str(info.annotation) else ""), inner)

    visit(SECTION, config.LocalParallelConfig)
    return found


def type_name(info: FieldInfo) -> str:
    text = (
        str(info.annotation)
        if hasattr(info.annotation, "__args__")
        else getattr(info.annotation, "__name__", "")
    )
    text = re.sub(r"ds_local\.config\.\w+\.", "", text)
    for word in ("typing.", "Annotated", "NoneType", "None"):
        text = text.replace(word, "")
    if "Literal" in text:
        choices = " or ".join(
            f"`{value!r}`".replace("'", '"') for value in dict.fromkeys(_choices(info.annotation))
        )
        also = (
            ""
            if "tuple" not in text
            else "list of "
            if text.startswith("tuple")
            else ", or a list of these"
        )
        number = (
            "int or "
            if any(
                getattr(part, "__origin__", part) is int
                for part in getattr(info.annotation, "__args__", ())
            )
            else ""
        )
        return f"{also}{choices}" if also == "list of " else f"{number}{choices}{also}"
    if models_in(info.annotation):
        return "list of objects" if "tuple" in text else "object"
    kinds = [word for word in ("int", "float", "str", "bool") if word in text]
    kind = " or ".join(kinds)
    single = "tuple" in text and not text.startswith("tuple") and info.default is not None
    return f"{kind} or list of {kind}" if single else f"list of {kind}" if "tuple" in text else kind


def _choices(annotation: Any) -> list[Any]:
    inner = [value for value in getattr(annotation, "__args__", ()) if isinstance(value, str)]
    return inner or [
        value for part in getattr(annotation, "__args__", ()) for value in _choices(part)
    ]


def default_of(info: FieldInfo) -> str:
    if (
        info.default is None
        or info.default is PydanticUndefined
        or isinstance(info.default, BaseModel)
    ):
        return ""
    return f"`{json.dumps(info.default)}`"


def reference() -> str:
    parts = [HEADER]
    seen: set[type[BaseModel]] = set()
    for path, model in sections():
        if model in seen:
            continue
        # what entries of a mix or of phases share with the section itself is explained once
        shared = (
            set(config.LocalParallelConfig.model_fields)
            if issubclass(model, Row) and seen
            else set()
        )
        seen.add(model)
        also = " It takes `mode`, `window`, `combine` and `weights` as above" if shared else ""
        also += (
            " or `mix`, with `correction`, `run_ahead` and what corrects for it, and:"
            if "mix" in model.model_fields and shared
            else ", and:"
            if shared
            else ""
        )
        parts.append(f'## `"{path}"`\n\n{(model.__doc__ or "").strip()}{also}\n')
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        options = model.options() if issubclass(model, Strict) else {}
        for name, info in model.model_fields.items():
            if name not in shared:
                meaning = " ".join((info.description or "").split())
                if name in options:
                    only = " or ".join(f"`{value}`" for value in options[name].values)
                    meaning += f" Only with `{options[name].key}` {only}."
                rows.append(f"| `{name}` | {type_name(info)} | {default_of(info)} | {meaning} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def json_schema() -> str:
    """Of a whole ds_config.json, so that editors complete and check our section in it."""
    section = config.LocalParallelConfig.model_json_schema()
    definitions = section.pop("$defs")
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "DeepSpeed config with a local_parallel section",
        "type": "object",
        "properties": {"$schema": {"type": "string"}, SECTION: section},
        "$defs": definitions,
    }
    return json.dumps(whole, indent=1) + "\n"


def main() -> int:
    for path, text in ((PAGE, reference()), (SCHEMA, json_schema())):
        write_file(path, text)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
