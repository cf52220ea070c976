"""What README and docs say is so: their files and options exist, the configuration page is up to
date."""

import contextlib
import io
import json
import re
import runpy
import sys
from functools import lru_cache

import pytest
from launch import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_json_in_the_readme_is_valid():
    from ds_local.config.files import local_parallel

    for text in blocks("json"):
        local_parallel(json.loads("{" + text + "}"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_and_commands_named_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for script in set(re.findall(r"(?:python|bash) (scripts/[\w/]+\.(?:py|sh))", text)):
        assert (ROOT / script).exists(), script


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_in_commands_exist(page):
    """Every option after `scripts/x.py` in a code block is one that the script knows."""
    text = page.read_text().replace("\\\n", " ")
    for script, rest in re.findall(r"(?:python|deepspeed[^\n]*?) (scripts/\w+\.py)([^\n`]*)", text):
        for option in re.findall(r"(--[\w-]+)", rest):
            known = script == "scripts/benchmark.py" or option in help_of(script)
            assert known, f"{script} has no {option}"


@lru_cache
def help_of(script):
    out, argv = io.StringIO(), list(sys.argv)
    try:
        sys.argv[:] = [script, "--help"]
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv[:] = argv
    return out.getvalue()


def test_the_configuration_page_and_the_schema_are_up_to_date():
    import config_reference

    for path, text in (
        (config_reference.PAGE, config_reference.reference()),
        (config_reference.SCHEMA, config_reference.json_schema()),
    ):
        assert path.read_text() == text, "run python scripts/config_reference.py"
