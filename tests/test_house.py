"""The house rules: who may import whom, what stays pure Python, and how long things may get."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ds_local"
FILES = sorted(PACKAGE.rglob("*.py"))

# from the ground up; a room may import what stands before it, never what comes after
ROOMS = [
    "errors",
    "outputs",
    "config",
    "charts",
    "schedules",
    "links",
    "model",
    "replicas",
    "data",
    "cluster",
    "checkpoints",
    "engine",
    "training",
    "measure",
    "study",
    "cli",
]
PURE = ["errors", "config", "charts", "schedules"]  # neither torch nor DeepSpeed
DEEPSPEED = {"engine", "measure"}  # measure runs DeepSpeed's own pipeline beside ours
TRANSFORMERS = {"model", "data", "checkpoints", "measure"}


def name(path):
    return str(path.relative_to(PACKAGE).with_suffix(""))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imports(path):
    """(top-level packages, own modules as (room, file or None)) that a file imports anywhere."""
    packages, own = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
            named = [alias.name for alias in node.names if alias.name.startswith("ds_local.")]
        elif isinstance(node, ast.ImportFrom) and node.module:
            packages.add(node.module.split(".")[0])
            of_room = node.module.startswith("ds_local.") and node.module.count(".") == 1
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            named = whole if of_room else [node.module]
            named = [one for one in named if one.startswith("ds_local.")]
        else:
            continue
        own |= {tuple(one.split(".")[1:3]) for one in named}
    return packages, own


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != PACKAGE], ids=name)
def test_imports_go_downwards(path):
    room = room_of(path)
    packages, own = imports(path)
    for other, *_ in own:
        assert ROOMS.index(other) <= ROOMS.index(room), f"{name(path)} imports {other}"
    assert room in DEEPSPEED or "deepspeed" not in packages
    assert room in TRANSFORMERS or "transformers" not in packages


@pytest.mark.parametrize("room", ROOMS[1:])
def test_no_circles_within_a_room(room):
    arrows = {
        path.stem: {file[0] for other, *file in imports(path)[1] if other == room and file}
        for path in (PACKAGE / room).glob("*.py")
    }
    while leaves := {file for file, needs in arrows.items() if not needs & arrows.keys()}:
        arrows = {file: needs for file, needs in arrows.items() if file not in leaves}
    assert not arrows, f"these import each other: {arrows}"


def test_every_room_has_its_place():
    folders = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert folders | {"errors"} == set(ROOMS)


def test_no_two_test_files_share_a_name():
    """All test folders are on the path: the second of a name would hide behind the first."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert sorted(names) == sorted(set(names))


# modules without a test file of their name in the folder of their room, because they make sense on
# several ranks or in scripts alone, or because the name is taken: the file that exercises each, and
# a word in it, or in a helper that it imports: a name of the module or of one that imports it, or a
# script that runs it
TESTED_IN = {
    "model/anatomy": ("model/test_frames", "frame_of"),
    "model/compiling": ("model/test_compiled_loss", "compiled_cross_entropy"),
    "model/state": ("model/test_routers", "hidden_of"),
    "config/files": ("config/test_bad_settings", "load_config"),
    "schedules/cells": ("schedules/test_sheets", "csv_of"),
    "links/frames": ("links/test_lasting", "read_frame"),
    "links/groups": ("dist/test_groups", "in_turn"),
    "links/ends": ("dist/test_links", "Peer"),
    "links/pair": ("dist/test_links", "Receiver"),
    "replicas/engine": ("dist/test_replicas", "subnets"),  # what engines must have, a protocol
    "replicas/group": ("dist/test_replicas", "subnets"),
    "replicas/periodic": ("dist/test_replicas", "periodic"),
    "replicas/members": ("replicas/test_elastic", "MeetingPlace"),
    "replicas/joining": ("replicas/test_elastic", "join"),
    "links/lasting_receiver": ("links/test_lasting", "LastingReceiver"),
    "links/lasting_sender": ("links/test_lasting", "LastingSender"),
    "links/line": ("links/test_lasting", "Place"),
    "replicas/sync": ("dist/test_replicas", "periodic"),
    "checkpoints/gathered_books": ("checkpoints/test_gathering", "gather_units"),
    "checkpoints/hf_export": ("dist/test_exports", "hf_export"),
    "engine/causal_lm": ("dist/test_engine", "causal_lm"),
    "engine/connections": ("dist/test_groups", "Connections"),
    "engine/engine": ("dist/test_engine", "train_batch"),
    "engine/executor": ("dist/test_engine", "train_batch"),
    "engine/finite_weights": ("dist/test_nonfinite", "check_weights_finite"),
    "engine/loading": ("dist/test_loading", "load_checkpoint"),
    "engine/loading_checks": ("dist/test_loading", "load_what_fits"),
    "engine/moving": ("dist/test_moving", "Move"),
    "engine/module": ("engine/test_initialize", "LocalPipelineModule"),
    "engine/module_files": ("dist/test_loading", "load_state_dir"),
    "engine/process_group": ("dist/test_waits", "end_processes"),
    "engine/saving": ("dist/test_saving", "save_checkpoint"),
    "engine/unit_links": ("launchers/test_lone_deaths", "train.py"),
    "engine/updates": ("dist/test_engine", "own_loss"),
    "training/books": ("launchers/test_train", "train.py"),
    "training/diagnostics": ("dist/test_copies", "diagnostics"),
    "training/keeping": ("launchers/test_run_options", "train.py"),
    "training/loop": ("launchers/test_train", "train.py"),
    "training/samples": ("dist/test_writing", "samples"),
    "training/steps": ("launchers/test_train", "train.py"),
    "training/units": ("training/test_lone_units", "check_flapping"),
    "training/dry_run": ("launchers/test_run_options", "train.py"),
    "measure/fleet": ("measure/test_stage_alone", "Fleet"),
    "measure/stage_alone_page": ("measure/test_stage_alone", "page"),
    "measure/device": ("measure/test_device_timing", "Device"),
    "measure/emulated": ("test_benchmark", "sweep"),
    "measure/gpu": ("test_benchmark", "gpu"),
    "measure/gpu_engine": ("test_benchmark", "gpu"),
    "measure/heads": ("test_benchmark", "heads"),
    "measure/pictures": ("test_benchmark", "pictures"),
    "measure/ranks": ("dist/test_rank_pool", "Pool"),
    "measure/real": ("test_benchmark", "until_loss"),
    "measure/real_systems": ("test_benchmark", "real_systems"),
    "measure/report": ("test_benchmark", "markdown"),
    "measure/tables": ("test_benchmark", "markdown"),
    "measure/warm": ("dist/test_rank_pool", "warm"),
    "cli/benchmark": ("test_benchmark", "benchmark"),
    "cli/gather": ("checkpoints/test_gathering", "gather"),
    "cli/generate": ("dist/test_exports", "continue_text"),
    "cli/report": ("training/test_report", "report"),
    "cli/train": ("launchers/test_train", "train.py"),
}
MODULES = {name(p): p for p in FILES if not p.name.startswith("__")}


def own_test(module):
    room, _, stem = f"/{module}".rpartition("/")
    return ROOT / f"tests{room}" / f"test_{stem}.py"


def test_every_module_has_a_test_file_of_its_name_or_an_entry():
    untested = {module for module in MODULES if not own_test(module).exists()}
    assert untested - TESTED_IN.keys() == set(), "write a test file of this name, or an entry"
    assert TESTED_IN.keys() - untested == set(), "these entries are left over"


@pytest.mark.parametrize("module", TESTED_IN)
def test_what_an_entry_names_exercises_the_module(module):
    file, word = TESTED_IN[module]
    part = tuple(module.split("/"))
    near = {module} | {other for other, path in MODULES.items() if part in imports(path)[1]}
    known = set().union(*map(names_of, near)) - {"main"}
    assert word in known or (ROOT / "scripts" / word).is_file(), f"{word} is none of its names"
    texts = [path.read_text() for path in with_helpers(ROOT / "tests" / f"{file}.py")]
    assert any(re.search(rf"\b{re.escape(word)}\b", text) for text in texts)


@cache
def names_of(module):
    """What others call in a module, and its own name."""
    nodes = ast.parse(MODULES[module].read_text()).body
    kinds = ast.FunctionDef | ast.ClassDef
    nodes += [one for node in nodes if isinstance(node, ast.ClassDef) for one in node.body]
    found = {node.name for node in nodes if isinstance(node, kinds)}
    return {one for one in found if not one.startswith("_")} | {module.rpartition("/")[2]}


def with_helpers(path):
    """A test file, and the files beside the tests that it imports, and those that they import."""
    beside = {one.stem: one for one in (ROOT / "tests").rglob("*.py")}
    found, left = set(), [path]
    while left:
        one = left.pop()
        if one not in found:
            found.add(one)
            left += [beside[package] for package in imports(one)[0] if package in beside]
    return found


def test_tests_of_several_processes_are_collected(pytestconfig):
    assert "dist" not in pytestconfig.getini("norecursedirs")


def test_schedules_can_be_looked_at_without_torch():
    modules = [name(p).replace("/", ".") for p in FILES if room_of(p) in PURE]
    lines = "; ".join(f"import ds_local.{module.removesuffix('.__init__')}" for module in modules)
    heavy = "{'torch', 'deepspeed', 'transformers'}"
    code = f"import sys; {lines}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow  # tests/launchers/test_whole_runs.py runs all of an exit without it
def test_export_needs_no_deepspeed():
    code = "import sys; sys.modules['deepspeed'] = None; import ds_local.checkpoints.hf_export"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_an_engine_needs_no_package_for_data():
    """Where tokens come from elsewhere, as in tests/gpu, none of them need be there."""
    code = "import sys; sys.modules |= dict.fromkeys(('datasets', 'pyarrow')); import ds_local"
    code += "; ds_local.causal_lm, ds_local.initialize"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# what is longer than 300 lines, and why it is not two files
LONG_FILES = {
    "engine/engine": (650, "one class; its parts are StageUpdates, Executor, saving, loading"),
    "engine/module": (330, "one class: what a stage holds and computes"),
    "cli/train": (330, "one parser for all options of a run"),
    "engine/executor": (530, "one class: every instruction, in the order of a micro-batch"),
    "schedules/list_scheduler": (370, "one event loop over one state"),
    "schedules/replay": (330, "one program: events of links and stages, and its clocks"),
    "schedules/schedule": (330, "the schedule itself and what is worked out from it"),
    "schedules/simulator": (340, "one time line, and the search for its steady state"),
    "schedules/routes": (330, "the table and all its rows"),
    "cli/benchmark": (330, "one parser for seven benchmarks"),
    "engine/deepspeed_seam": (400, "every private name of DeepSpeed, and what stands for it"),
}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    most, _ = LONG_FILES.get(name(path), (300, ""))
    assert text.count("\n") <= most
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) is not None and len(node.body) > 1
            begins = node.body[1 if documented else 0].lineno
            assert node.end_lineno - begins < 60, f"{node.name} in {name(path)}"


def test_no_exception_is_left_over():
    for path in FILES:
        if name(path) in LONG_FILES:
            assert path.read_text().count("\n") > 300, f"{name(path)} needs none any more"
    assert LONG_FILES.keys() <= {name(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_user_mistakes_are_no_asserts_and_nothing_is_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assert):
            assert node.msg is not None, f"{name(path)}:{node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), (
                f"{name(path)}:{node.lineno}"
            )


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=["lint", "format", "types"],
)
def test_tools(command):
    result = subprocess.run(
        [sys.executable, "-m", *command],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout + result.stderr
