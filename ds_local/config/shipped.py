"""The configs that come with the package, found by name, as in deepspeed/gpt2-small.json."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# in an installed package inside it, in a checkout beside it
FOLDER = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
MODELS = sorted(
    path.name for path in FOLDER.glob("*.json") if not path.name.endswith(".schema.json")
)
DEEPSPEED = sorted(f"deepspeed/{path.name}" for path in (FOLDER / "deepspeed").glob("*.json"))


def find(source: str | Path) -> Path:
    """The file that a name means: the user's own where there is one, else the shipped one of that
    name, with or without "configs/" before it; else the name as it is."""
    path = Path(source)
    name = path.as_posix().removeprefix("configs/")
    return FOLDER / name if not path.exists() and name in (*MODELS, *DEEPSPEED) else path
