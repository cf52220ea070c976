"""Print what is not finite in the latest checkpoint of a run, as JSON: {file: [names of tensors]}.

    python tests/faults/look.py RUN_DIR

Only for folders that a campaign has just made itself: the files are unpickled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def tensors(content: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from tensors(value, f"{name}.{key}")
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from tensors(value, f"{name}.{number}")


def main() -> None:
    checkpoints = Path(sys.argv[1], "checkpoints")
    found: dict[str, list[str]] = {}
    for path in sorted((checkpoints / (checkpoints / "latest").read_text()).glob("*.pt")):
        content = torch.load(path, weights_only=False)
        floats = ((name, tensor) for name, tensor in tensors(content) if tensor.is_floating_point())
        names = [name for name, tensor in floats if not tensor.isfinite().all()]
        if names:
            found[path.name] = names
    print(json.dumps(found))


if __name__ == "__main__":
    main()
