"""What the site needs beyond Markdown; mkdocs.yml names this file."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/ lead nowhere on the site: their words stay."""
    return re.sub(
        r"\[([^\]]+)\]\(\.\./(?:\.\./)?(?:configs|ds_local|scripts)/[^)]*\)", r"\1", markdown
    )
