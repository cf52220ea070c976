"""DeepSpeed's private names are in one file, and checked when it is imported."""

import ast
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
from deepspeed.runtime.pipe.engine import PipelineEngine

from ds_local.engine import deepspeed_seam as seam
from ds_local.engine import deepspeed_version
from ds_local.errors import ConfigError, UnsupportedDeepSpeed

PACKAGE = Path(__file__).parents[2] / "ds_local"
SOURCES = ("engine", "pipe/engine", "pipe/module", "pipe/topology", "bf16_optimizer", "config")


def private(name):
    tuples = {"_replace", "_asdict", "_fields"}  # of any NamedTuple
    return name.startswith("_") and not name.endswith("__") and name not in tuples


def names_in(path):
    """Private attributes that a file uses or defines, with whether they are of `self`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and private(node.attr):
            found.add((node.attr, isinstance(node.value, ast.Name) and node.value.id == "self"))
        if isinstance(node, ast.ClassDef):
            methods = (one.name for one in node.body if isinstance(one, ast.FunctionDef))
            found |= {(name, True) for name in methods if private(name)}
    return found


@pytest.fixture(scope="module")
def of_deepspeed():
    runtime = Path(deepspeed.__file__).parent / "runtime"
    paths = [*(runtime / f"{name}.py" for name in SOURCES), *(runtime / "zero").glob("stage*.py")]
    return {name for path in paths for name, _ in names_in(path)}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_private_names_of_deepspeed_are_used_in_the_seam_alone(path, of_deepspeed):
    if path.stem == "deepspeed_seam":
        assert {name for name, _ in names_in(path)} & of_deepspeed >= {"_INSTRUCTION_MAP", "_grid"}
        return
    # a class of another room is none of DeepSpeed's, whatever it calls its own
    seen = {name for name, own in names_in(path) if not own or path.parent.name == "engine"}
    assert not seen & of_deepspeed


def test_every_private_name_that_the_seam_uses_is_checked(of_deepspeed):
    listed = {name for names in seam.NAMES.values() for name in names}
    used = {name for name, _ in names_in(Path(seam.__file__))} & of_deepspeed
    assert used <= listed


def test_a_name_that_is_gone_is_named():
    seam.check_names()
    with pytest.raises(UnsupportedDeepSpeed) as error:
        seam.check_names({PipelineEngine: ("_config", "_gone")})
    assert f"DeepSpeed {deepspeed.__version__} has no PipelineEngine._gone" in str(error.value)
    assert "tested with DeepSpeed 0.19.8" in str(error.value)
    assert isinstance(error.value, ConfigError)


@pytest.mark.parametrize("version", ["0.19.6", "0.18.9", "0.20.0", "1.0"])
def test_another_deepspeed_is_refused_by_its_version(version, monkeypatch):
    monkeypatch.setattr(deepspeed, "__version__", version)
    with pytest.raises(UnsupportedDeepSpeed, match=rf"{version} is installed.*pip install"):
        deepspeed_version.check()
    for fine in ("0.19.8", "0.19.8+cpu", "0.19.12"):
        monkeypatch.setattr(deepspeed, "__version__", fine)
        deepspeed_version.check()


@pytest.mark.parametrize(
    "line", ["from ds_local import causal_lm", "import ds_local.engine.module"]
)
def test_it_is_found_out_at_the_first_import(line):
    stand_in = "import sys, types; sys.modules['deepspeed'] = m = types.ModuleType('deepspeed'); "
    code = f"{stand_in} m.__version__ = '0.19.6'; {line}"
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert "UnsupportedDeepSpeed: DeepSpeed 0.19.6 is installed" in result.stderr
