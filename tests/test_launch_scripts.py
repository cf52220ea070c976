"""The launch scripts: what they would start is read by the launchers' own parsers, and by
train.py's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import BIN, ROOT

sys.path.insert(0, str(ROOT / "scripts"))
SCRIPTS = ROOT / "scripts" / "launch"
SAY = """#!/bin/sh
[ "$(basename "$0")" = python ] && exit 0
printf "%s\\n" "$(basename "$0")" "$@" > "$SAID"
"""


def started(tmp_path, script, **environment):
    """The words of the command that `script` ends in; the launchers are replaced by scripts that
    write them down."""
    for name in ("deepspeed", "torchrun", "accelerate", "srun", "python"):
        (tmp_path / name).write_text(SAY)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node-a\\nnode-b\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    said = tmp_path / "said"
    result = subprocess.run(
        ["bash", str(SCRIPTS / script), "--mode", "interlocking"],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SAID": str(said), **environment},
    )
    return said.read_text().splitlines() if result.returncode == 0 else result.stderr


def job_of(words):
    from ds_local.cli import train

    arguments = train.parse_arguments(words)
    assert Path(ROOT, arguments.model).is_file()
    assert Path(ROOT, arguments.deepspeed_config).is_file()
    assert arguments.mode == "interlocking"
    return arguments


def after_script(words):
    place = words.index("scripts/train.py")
    return words[place + 1 :]


def test_deepspeed(tmp_path):
    from deepspeed.launcher.runner import parse_args

    words = started(tmp_path, "deepspeed.sh")
    parsed = parse_args(words[1:])
    assert (words[0], parsed.hostfile, parsed.user_script) == (
        "deepspeed",
        "configs/hostfile",
        "scripts/train.py",
    )
    assert job_of(parsed.user_args).num_stages == 8
    words = started(
        tmp_path,
        "deepspeed_no_ssh.sh",
        NODE_RANK="1",
        MASTER_ADDR="10.0.0.1",
        PORT="29501",
        STAGES="4",
    )
    parsed = parse_args(words[1:])
    assert (parsed.no_ssh, parsed.node_rank, parsed.master_addr, parsed.master_port) == (
        True,
        1,
        "10.0.0.1",
        29501,
    )
    assert job_of(parsed.user_args).num_stages == 4


def test_deepspeed_without_ssh_asks_for_what_it_needs(tmp_path):
    assert "which line of the hostfile is this machine?" in started(tmp_path, "deepspeed_no_ssh.sh")
    assert "there is no hostfile /nowhere" in started(
        tmp_path, "deepspeed_no_ssh.sh", HOSTFILE="/nowhere"
    )


def test_torchrun(tmp_path):
    from torch.distributed.run import parse_args

    words = started(tmp_path, "torchrun.sh", NODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1")
    parsed = parse_args(words[1:])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.node_rank, parsed.master_addr) == (
        "2",
        "8",
        1,
        "10.0.0.1",
    )
    job_of(parsed.training_script_args)


def test_accelerate(tmp_path):
    from accelerate.commands.launch import launch_command_parser

    words = started(
        tmp_path, "accelerate.sh", NODES="2", DEVICES="4", MODEL="configs/llama-1b.json"
    )
    parsed = launch_command_parser().parse_args(words[2:])
    assert (words[:2], parsed.num_machines, parsed.num_processes) == (
        ["accelerate", "launch"],
        2,
        8,
    )
    assert job_of(parsed.training_script_args).deepspeed_config == "configs/deepspeed/llama-1b.json"


def test_slurm(tmp_path):
    from torch.distributed.run import parse_args

    job = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
    }
    words = started(tmp_path, "slurm.sbatch", **job)
    assert words[:3] == ["srun", "--kill-on-bad-exit=1", "torchrun"]
    parsed = parse_args(words[3:])
    assert (parsed.nnodes, parsed.rdzv_endpoint, parsed.rdzv_id) == ("2", "node-a:29500", "7")
    job_of(after_script(words))
    assert "start this with sbatch" in started(tmp_path, "slurm.sbatch")


def test_units(tmp_path):
    from torch.distributed.run import parse_args

    words = started(tmp_path, "unit.sh", UNIT="2", DEVICES="2")
    parsed = parse_args(words[1:])
    assert (words[0], parsed.standalone, parsed.nproc_per_node) == ("torchrun", True, "2")
    assert parsed.max_restarts == 1000
    arguments = job_of(parsed.training_script_args)
    assert (arguments.unit, arguments.resume) == (2, True)
    words = started(tmp_path, "unit.sh", UNIT="3", NODES="2", MASTER_ADDR="10.0.0.1", RESTARTS="0")
    parsed = parse_args(words[1:])
    assert (parsed.nnodes, parsed.rdzv_endpoint) == ("2", "10.0.0.1:29503")
    assert job_of(parsed.training_script_args).unit == 3
    assert "which unit is this, counted from 0?" in started(tmp_path, "unit.sh")


def test_units_of_a_service():
    lines = (SCRIPTS / "ds-local-unit@.service").read_text().splitlines()
    keys = dict(line.split("=", 1) for line in lines if "=" in line and line[0] not in "# ")
    assert keys["ExecStart"].split()[-1] == "scripts/launch/unit.sh"
    assert "UNIT=%i" in keys["Environment"].split()
    assert (keys["Restart"], keys["StartLimitIntervalSec"]) == ("on-failure", "3600")


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*")), ids=lambda path: path.name)
def test_scripts_are_short(script):
    assert len(script.read_text().splitlines()) <= 20
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_launchers_are_installed():
    assert all(os.access(BIN / name, os.X_OK) for name in ("deepspeed", "torchrun", "accelerate"))
