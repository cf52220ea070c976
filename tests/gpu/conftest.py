"""Tests that need a GPU: two ranks share one, their messages staged through the host.

    DS_ACCELERATOR=cuda python -m pytest tests/gpu

Elsewhere they are skipped. `DS_LOCAL_TRY=1` runs those on a CPU that make sense there, to try them.
"""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") == "cuda"
TRY = os.environ.get("DS_LOCAL_TRY") == "1"


def pytest_collection_modifyitems(items):
    here = [item for item in items if item.path.parent == item.config.rootpath / "tests" / "gpu"]
    for item in here:
        if not ON_GPU and (not TRY or item.get_closest_marker("device")):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and DS_ACCELERATOR=cuda"))
