"""Which DeepSpeed this package works with. Its pipeline engine changes from release to release."""

from __future__ import annotations

from packaging.version import Version

from ds_local.errors import UnsupportedDeepSpeed

TESTED = ("0.19.8",)
LOWEST, BELOW = "0.19.8", "0.20"
REMEDY = (
    f"ds_local is tested with DeepSpeed {', '.join(TESTED)}: run pip install "
    f"deepspeed=={TESTED[-1]}"
)


def check() -> None:
    """Raises UnsupportedDeepSpeed when DeepSpeed is missing or of another version."""
    try:
        from deepspeed import __version__ as found
    except ImportError as error:
        raise UnsupportedDeepSpeed(f"DeepSpeed cannot be imported ({error}); {REMEDY}") from error
    if not Version(LOWEST) <= Version(Version(found).base_version) < Version(BELOW):
        raise UnsupportedDeepSpeed(f"DeepSpeed {found} is installed; {REMEDY}")
