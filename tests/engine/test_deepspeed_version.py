"""Which DeepSpeed this package works with."""

import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest

from ds_local.engine import deepspeed_version
from ds_local.errors import UnsupportedDeepSpeed


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
        command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert "UnsupportedDeepSpeed: DeepSpeed 0.19.6 is installed" in result.stderr
