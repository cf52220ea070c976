"""What a MODEL argument can be: a Hugging Face folder, a folder of all exits, a run folder or a
checkpoint folder."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path


def add_model(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help="a Hugging Face folder or name, a folder of all exits, a run folder or a checkpoint "
        "folder",
    )


def exits_of(model: str, scratch: str) -> dict[int, Path]:
    """Segment -> Hugging Face folder of its exit; the last is the full model. One entry, 0, for a
    plain folder or hub name.

    Args:
        scratch: where a run is exported to.

    Raises:
        ExportError, CheckpointError: when a run cannot be exported.
    """
    folder = Path(model)
    if (folder / "config.json").is_file() or not folder.exists():
        return {0: folder}
    written = {
        int(path.name.removeprefix("segment_")): path
        for path in folder.glob("segment_*")
        if path.is_dir() and path.name.removeprefix("segment_").isdecimal()
    }
    if written:
        return dict(sorted(written.items()))
    from ds_local.checkpoints.hf_export import export_all

    return export_all(folder, Path(scratch, "exits"))
