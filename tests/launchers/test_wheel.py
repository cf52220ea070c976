"""The package as it is published: built, installed, and used from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions

import pytest
from launch import ROOT, environment

import ds_local

pytestmark = pytest.mark.timeout(700)
PARTS = ("pyproject.toml", "README.md", "LICENSE", "ds_local", "configs")


def run(*words, cwd, **more):
    done = subprocess.run(
        [str(word) for word in words],
        check=False,
        cwd=cwd,
        env=environment() | more,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(site folder with the installed wheel, function that runs a command with it from an empty
    folder)."""
    folder = tmp_path_factory.mktemp("wheel")
    source, site, empty = folder / "source", folder / "site", folder / "empty"
    empty.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for part in PARTS:  # a build leaves things behind
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / part, source / part, **({"ignore": ignored} if copy is not shutil.copy else {}))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=folder)
    return site, lambda *words: run(*words, cwd=empty, PYTHONPATH=str(site))


def test_everything_of_the_package_is_in_it(installed):
    site, _ = installed
    (distribution,) = distributions(path=[str(site)])
    assert distribution.version == ds_local.__version__
    for part, inside in (("ds_local", "ds_local"), ("configs", "ds_local/configs")):
        ours = {
            path.relative_to(ROOT / part)
            for path in (ROOT / part).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert not [str(path) for path in ours if not (site / inside / path).is_file()]


def test_the_commands_are_there(installed):
    site, say = installed
    command = [sys.executable, site / "bin" / "ds-local"]
    assert say(*command, "--version") == f"ds_local {ds_local.__version__}\n"
    assert "simulate" in say(*command, "--help")
    row = ("--stages", 2, "--micro-batches", 2, "--mode", "local")
    shown = json.loads(say(*command, "simulate", *row, "--json", "-"))
    assert shown["makespan"] == 7  # two micro-batches of 3 each, one forward later on stage 1
    # of the names that it gives, the next test uses one
    assert "gpt2-nano.json" in say(sys.executable, "-m", "ds_local", "train", "--help")


def test_shipped_configs_are_found_by_name(installed):
    site, say = installed
    code = (
        "import json, ds_local; from ds_local.config.files import load_config\n"
        "steps = load_config('deepspeed/gpt2-small.json')['scheduler']['params']\n"
        "from ds_local.model import families\n"
        "width = families.load_model_config('gpt2-nano.json').n_embd\n"
        "print(json.dumps([ds_local.__file__, ds_local.__version__, steps, width]))"
    )
    found = json.loads(say(sys.executable, "-c", code))
    shipped = json.loads((ROOT / "configs" / "deepspeed" / "gpt2-small.json").read_text())
    assert found == [
        os.fspath(site / "ds_local" / "__init__.py"),
        ds_local.__version__,
        shipped["scheduler"]["params"],
        json.loads((ROOT / "configs" / "gpt2-nano.json").read_text())["n_embd"],
    ]
