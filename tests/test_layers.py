"""The house rules: who may import whom, what stays pure Python, and how long things may get."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ds_local"
FILES = sorted(PACKAGE.glob("*.py"))

# from the ground up; a module may import what stands before it, never what comes after
ORDER = [
    "routes", "schedule", "order", "peers", "simulator", "config", "deepspeed_config", "partition", "seeds", "heads",
    "weight_gradients",
    "blocks", "flops", "pricing", "planner", "data", "corpus", "notices", "checkpoint", "replacements", "instructions", "tensors",
    "codecs", "surroundings", "staging", "transport", "cluster", "copies", "diagnostics", "replicas", "subnets", "profiling",
    "pretrained", "module", "metrics", "watchdog", "engine", "start", "card", "hf", "train", "ranks",
]  # fmt: skip
PURE = ["routes", "schedule", "order", "peers", "simulator", "config", "deepspeed_config", "partition", "card"]
DEEPSPEED = {"replacements", "instructions", "module", "engine", "start"}
TRANSFORMERS = {"blocks", "corpus", "hf"}


def imports(path):
    """Names a file imports at any depth: top-level packages, and own modules."""
    packages, own = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            packages.add(node.module.split(".")[0])
            if node.module == "ds_local":
                own |= {alias.name for alias in node.names}
            elif node.module.startswith("ds_local."):
                own.add(node.module.split(".")[1])
    return packages, own


@pytest.mark.parametrize("path", [p for p in FILES if p.stem != "__init__"], ids=lambda p: p.stem)
def test_imports_go_downwards(path):
    packages, own = imports(path)
    assert path.stem in ORDER, f"{path.name} has no place in the order yet"
    for other in own:
        assert ORDER.index(other) < ORDER.index(path.stem), f"{path.stem} imports {other}"
    assert path.stem in DEEPSPEED or "deepspeed" not in packages
    assert path.stem in TRANSFORMERS or "transformers" not in packages


def test_tests_of_several_processes_are_collected(pytestconfig):
    assert "dist" not in pytestconfig.getini("norecursedirs")


def test_schedules_can_be_looked_at_without_torch():
    heavy = "{'torch', 'deepspeed', 'transformers'}"
    code = f"import sys; import ds_local; from ds_local import {', '.join(PURE)}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_export_needs_no_deepspeed():
    code = "import sys; sys.modules['deepspeed'] = None; import ds_local.hf"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert text.count("\n") <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 70, f"{node.name} in {path.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_user_mistakes_are_no_asserts_and_nothing_is_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assert):
            assert node.msg is not None, f"{path.name}:{node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=["lint", "format", "types"]
)
def test_tools(command):
    result = subprocess.run([sys.executable, "-m", *command], check=False, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stdout + result.stderr
