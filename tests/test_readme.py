"""What README and docs say is so: the script in them runs, their files exist, the configuration
page is up to date."""

import json
import re
import subprocess
import sys
from functools import lru_cache

import pytest
from launch import BIN, ROOT, environment
from ranks import free_port

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_script_runs_as_it_stands(tmp_path):
    """Under two ranks, in a folder with the configs it names."""
    (tmp_path / "script.py").write_text(blocks("python")[0])
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "gpt2-nano.json").write_text(
        (ROOT / "configs" / "gpt2-nano.json").read_text()
    )
    (tmp_path / "ds_config.json").write_text((ROOT / "ds_config.json").read_text())
    command = [
        str(BIN / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        "script.py",
    ]
    result = subprocess.run(
        command,
        check=False,
        cwd=tmp_path,
        env=environment(),
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "checkpoints" / "global_step10" / "ds_local.json").is_file()


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
        known = help_of(script)
        for option in re.findall(r"(--[\w-]+)", rest):
            assert option in known or script == "scripts/benchmark.py", f"{script} has no {option}"


@lru_cache
def help_of(script):
    command = [sys.executable, ROOT / script, "--help"]
    return subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120
    ).stdout


def test_the_configuration_page_and_the_schema_are_up_to_date():
    import config_reference

    for path, text in (
        (config_reference.PAGE, config_reference.reference()),
        (config_reference.SCHEMA, config_reference.json_schema()),
    ):
        assert path.read_text() == text, "run python scripts/config_reference.py"
