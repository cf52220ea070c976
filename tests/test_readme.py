"""What README and docs say is so: the script in them runs, their files, links and pictures exist
and are up to date, nothing is too long or too wide to read."""

import contextlib
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from functools import lru_cache

import pytest
from launch import BIN, ROOT, environment

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def name_of(page):
    return str(page.relative_to(ROOT))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_can_be_read(page):
    if page.parent.name == "results":
        pytest.skip("long tables and raw figures live there")
    wide = [
        line for line in page.read_text().splitlines() if re.match(r"(\|\s*:?-+:?\s*){8,}\|", line)
    ]
    assert not wide


def test_schemes_as_json_in_the_concepts_are_valid():
    from ds_local.config.files import local_parallel

    schemes = blocks("json", (ROOT / "docs" / "concepts.md").read_text())
    assert schemes
    for text in schemes:
        local_parallel(json.loads("{" + text + "}"))


def anchors(page):
    """Of the headings of a page, as code hosts and mkdocs both make them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_commands_named_exist(page):
    text = page.read_text()
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), f"{target}#{anchor}"
    for script in set(re.findall(r"(?:python|bash) (scripts/[\w/]+\.(?:py|sh))", text)):
        assert (ROOT / script).exists(), script


@pytest.mark.parametrize("page", PAGES, ids=name_of)
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


def test_the_glossary_has_every_word_of_the_package():
    import ds_local

    words = re.sub(r"\n +", " ", ds_local.__doc__.partition("Words\n")[2].partition("Sizes")[0])
    named = {entry.partition(":")[0].strip() for entry in words.split("\u00b7")} - {""}
    glossary = (ROOT / "docs" / "glossary.md").read_text()
    known = re.findall(r"^\| ([^|]+) \|", glossary, re.MULTILINE)
    assert len(named) > 10
    assert named <= set(known)
    assert len(known) == len(set(known))


def test_the_generated_pages_are_up_to_date():
    import generated_pages

    for path, text in generated_pages.pages():
        assert path.read_text() == text, "run python scripts/generated_pages.py"


def test_the_pictures_are_up_to_date():
    import pictures

    drawn = dict(pictures.pictures())
    assert {path.name for path in drawn} == {p.name for p in pictures.FOLDER.iterdir()}
    for path, text in drawn.items():
        assert path.read_text() == text, "run python scripts/pictures.py"


def test_the_map_is_the_simulators_and_the_studys():
    """A few cells, worked out again."""
    import choosing

    from ds_local.model.families import load_model_config

    facts = json.loads(choosing.DATA.read_text())
    file, seq_len = choosing.MODELS["GPT-2 small"]
    model = load_model_config(str(ROOT / "configs" / file))
    for row, column in ((0, 4), (2, 0), (3, 7)):
        count, ratio = choosing.MICRO_BATCHES[row], choosing.RATIOS[column]
        kept = facts["models"]["GPT-2 small"]["times"][row][column]
        assert kept == choosing.times_of(model, seq_len, count, ratio), "run scripts/choosing.py"


def test_the_site_builds(tmp_path):
    mkdocs = shutil.which("mkdocs", path=f"{BIN}:{environment()['PATH']}")
    if mkdocs is None:
        pytest.skip("mkdocs is not installed; pip install -e .[docs]")
    command = [mkdocs, "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "site" / "choosing.html").read_text()
    assert 'src="pictures/choosing.svg"' in page
