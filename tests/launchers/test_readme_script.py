"""The script in README runs as it stands, in a folder with the configs that it names."""

import json
import re

import pytest
from launch import ROOT, finished, start
from samples import sampled

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("ranks", sampled([2], [1, 2]))
def test_the_script_runs_as_it_stands(ranks, tmp_path):
    """As one process and on two ranks; steps of fewer micro-batches are the same to the script."""
    (tmp_path / "script.py").write_text(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0])
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "gpt2-nano.json").write_text(
        (ROOT / "configs" / "gpt2-nano.json").read_text()
    )
    config = json.loads((ROOT / "ds_config.json").read_text())
    config["gradient_accumulation_steps"] = 2
    (tmp_path / "ds_config.json").write_text(json.dumps(config))
    result = finished(start(str(tmp_path / "script.py"), ranks=ranks, cwd=tmp_path), 300)
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "checkpoints" / "global_step10" / "ds_local.json").is_file()
