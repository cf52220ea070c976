"""DeepSpeed's private names are in one file, and checked when it is imported."""

import ast
from pathlib import Path

import deepspeed
import pytest
from deepspeed.runtime.pipe.engine import PipelineEngine

from ds_local.engine import deepspeed_seam as seam
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
