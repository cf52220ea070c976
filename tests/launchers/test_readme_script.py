"""The script in README runs as it stands, under the deepspeed launcher in a folder of its own."""

import re
import subprocess

from launch import BIN, ROOT, environment
from ranks import free_port

README = (ROOT / "README.md").read_text()


def test_the_script_runs_as_it_stands(tmp_path):
    """Under two ranks, in a folder with the configs it names."""
    (tmp_path / "script.py").write_text(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0])
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "gpt2-nano.json").write_text(
        (ROOT / "configs" / "gpt2-nano.json").read_text()
    )
    (tmp_path / "ds_config.json").write_text((ROOT / "ds_config.json").read_text())
    command = [
        str(BIN / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        "script.py",
    ]
    result = subprocess.run(
        command,
        check=False,
        cwd=tmp_path,
        env=environment(),
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "checkpoints" / "global_step10" / "ds_local.json").is_file()
