import os

# before anything imports torch or DeepSpeed
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from ranks import close_ranks


def pytest_addoption(parser):
    parser.addoption(
        "--rewrite-golden",
        action="store_true",
        help="write the golden files anew from what the code gives now",
    )


def pytest_collection_modifyitems(items):
    for item in items:
        if "/dist/" in str(item.path):
            item.add_marker("dist")


def pytest_sessionfinish():
    close_ranks()


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
