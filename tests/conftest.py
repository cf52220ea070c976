import gc
import os
from pathlib import Path

# before anything imports torch or DeepSpeed
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from fork_client import SHARED, ServerProcess
from launch import close_fork_server
from ranks import close_ranks

# tests/gpu: two ranks share a device. DS_ACCELERATOR=cuda python -m pytest tests/gpu
ON_GPU = torch.cuda.is_available() and os.environ["DS_ACCELERATOR"] == "cuda"
GROUPS = ("launchers", "ranks", "pure")
gc.disable()  # a second of CPU while the tests' imports come; `pytest_collection` ends it
TRY = os.environ.get("DS_LOCAL_TRY") == "1"  # on a CPU, those that make sense there


def pytest_addoption(parser):
    parser.addoption(
        "--rewrite-golden",
        action="store_true",
        help="write the golden files anew from what the code gives now",
    )


def pytest_configure(config):
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        server = ServerProcess()  # one for all workers: its imports take seconds of a core
        os.environ[SHARED] = server.address
        config.add_cleanup(server.close)


def pytest_collection_modifyitems(config, items):
    for item in items:
        item.add_marker(_group(item))
        if (
            "gpu" in item.path.parts
            and not ON_GPU
            and (item.get_closest_marker("device") or not TRY)
        ):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and DS_ACCELERATOR=cuda"))
    if "slow" not in config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    # the longest files first (stable, so each stays whole): none is left over for one worker alone
    items.sort(key=lambda item: GROUPS.index(_group(item)))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    collected = yield
    # imports and tests stay to the end: a collection, which many a test asks for, need not look
    # through them, nor does a fork copy their pages
    gc.collect()
    gc.freeze()
    gc.enable()
    return collected


def _group(item) -> str:
    """By the folder of the test; a file elsewhere that runs ranks goes with those of several
    processes."""
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    if folder in ("launchers", "faults"):
        return "launchers"
    return "ranks" if folder == "dist" or hasattr(item.module, "run_ranks") else "pure"


@pytest.fixture(autouse=True)
def _the_same_for_each():
    """Random numbers, and an environment without what the test before has set: a process group of
    one process sets RANK and the like."""
    torch.manual_seed(0)
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


def pytest_sessionfinish():
    close_ranks()
    close_fork_server()


@pytest.fixture
def golden(request):
    """Compare a text with tests/golden/NAME; with --rewrite-golden write it instead."""

    def compare(name: str, text: str) -> None:
        path = request.config.rootpath / "tests" / "golden" / name
        if request.config.getoption("--rewrite-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text + "\n")
        assert text + "\n" == path.read_text(), (
            f"{name} changed; if that was meant, run pytest --rewrite-golden and read the "
            "difference"
        )

    return compare
