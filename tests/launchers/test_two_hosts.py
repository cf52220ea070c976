"""Training over two hosts with addresses of their own, started the way the documentation says."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from fork_client import wait_for
from hosts import ADDRESSES, INTERFACE, NAMES, TwoHosts, why_no_ssh, why_not
from launch import BIN, ROOT, environment, fork_server, launch, losses, write_inputs

REASON = why_not()
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON or "-"), pytest.mark.timeout(900)]
ON_HOSTS = {
    "GLOO_SOCKET_IFNAME": INTERFACE,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "LOCAL_SIZE": "1",
}
LIMIT = 8
STEPS = "30"  # of a run whose cable is pulled at step 12
PULLED_SECONDS = float(os.environ.get("DS_LOCAL_PULLED_SECONDS", "4"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    section = {"mode": "local", "link": {"timeout_seconds": LIMIT}}
    return write_inputs(tmp_path_factory.mktemp("inputs"), local_parallel=section)


@pytest.fixture
def hosts(tmp_path):
    with TwoHosts(tmp_path) as two:
        yield two


def words(hosts, script, *arguments, no_ssh=True, rank=0):
    start = [
        str(BIN / "deepspeed"),
        "--hostfile",
        str(hosts.folder / "hostfile"),
        "--master_addr",
        ADDRESSES[0],
        "--master_port",
        "29777",
    ]
    start += ["--no_ssh", "--node_rank", str(rank)] if no_ssh else []
    return [*start, str(ROOT / "scripts" / script), *arguments]


def training(inputs, run, steps):
    flat = [
        part
        for pair in {**inputs, "--output": str(run), "--max-steps": str(steps)}.items()
        for part in pair
    ]
    return [*flat, "--deepspeed"]


def start_everywhere(hosts, script, *arguments):
    more = environment() | ON_HOSTS | {"PYTHONPATH": str(ROOT)}
    return [
        hosts.start(host, words(hosts, script, *arguments, rank=host), **more) for host in range(2)
    ]


def wait(processes, seconds):
    return [process.wait(timeout=seconds) for process in processes]


def fork(hosts, host, words, *hooks, **more):
    """train.py on a host without a launcher, which takes a tenth of the time."""
    enter = "enter_host", {"namespace": hosts.namespaces[host], "name": NAMES[host]}
    return fork_server().start(
        "train.py", words, env={**ON_HOSTS, **more}, hooks={0: [enter, *hooks]}
    )


def said(runs):
    return [run.output(0) for run in runs]


def check_equal_to_one_host(inputs, run, tmp_path, *more):
    output = {"--output": str(tmp_path / "alone"), "--max-steps": "4"}
    alone = launch({**inputs, **output}, *more, timeout=600)
    assert alone.returncode == 0, alone.stdout
    assert losses(run) == losses(tmp_path / "alone")
    facts = json.loads((run / "run.json").read_text())
    assert [facts["layout"]["hosts"][f"stage {stage}"]["hosts"] for stage in (0, 1)] == [
        [NAMES[0]],
        [NAMES[1]],
    ]


@pytest.mark.skipif(
    not why_no_ssh(), reason="the same is tested with the launcher's own start by ssh"
)
def test_two_hosts_train_as_one_does(hosts, inputs, tmp_path):
    codes = wait(start_everywhere(hosts, "train.py", *training(inputs, tmp_path / "run", 4)), 600)
    assert codes == [0, 0], hosts.outputs()
    assert f"stage 0 on {NAMES[0]} (rank 0); stage 1 on {NAMES[1]} (rank 1)" in hosts.outputs()[0]
    assert not hosts.processes_left()
    check_equal_to_one_host(inputs, tmp_path / "run", tmp_path)


@pytest.mark.skipif(bool(why_no_ssh()), reason=why_no_ssh() or "-")
def test_one_command_starts_both_hosts_by_ssh(hosts, inputs, tmp_path):
    """The last two of the five commands in docs/multi-node.md: the launch script looks at the
    machines before it starts them."""
    client = hosts.serve_ssh(ON_HOSTS | {"PATH": environment()["PATH"]})
    job = {
        "MODEL": inputs["--model"],
        "CONFIG": inputs["--deepspeed_config"],
        "DATA": inputs["--data"],
        "STAGES": "2",
        "RUN": str(tmp_path / "run"),
        "STEPS": "4",
        "HOSTFILE": str(hosts.folder / "hostfile"),
    }
    here = environment() | ON_HOSTS | {"PYTHONPATH": str(ROOT)} | job
    here["PATH"] = client["PATH"].replace(os.environ["PATH"], environment()["PATH"])
    process = hosts.start(0, ["bash", str(ROOT / "scripts" / "launch" / "deepspeed.sh")], **here)
    assert process.wait(timeout=600) == 0, hosts.outputs()
    assert hosts.outputs()[0].count("opens to ssh") == 2
    # the script validates every thousand steps, so before the first one too
    check_equal_to_one_host(inputs, tmp_path / "run", tmp_path, "--eval-every", "1000")


def test_a_cut_link_ends_both_hosts_and_is_named(hosts, inputs, tmp_path):
    run = tmp_path / "run"
    job = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29777"}
    job |= {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    words = training(inputs, run, 1_000_000)
    runs = [fork(hosts, host, words, **job, RANK=str(host)) for host in range(2)]
    deadline = time.monotonic() + 500
    while (
        not (run / "metrics.jsonl").exists()
        or len((run / "metrics.jsonl").read_text().splitlines()) < 6
    ):
        assert time.monotonic() < deadline, said(runs)
        assert all(one.alive() for one in runs), said(runs)
        time.sleep(0.2)
    hosts.cut()
    assert all(one.wait(300) for one in runs), said(runs)
    assert all(one.status(0) for one in runs), "both report the failure"
    for host, (text, other) in enumerate(zip(said(runs), (1, 0), strict=True)):
        assert f"stage {other} (rank {other})" in text, text[-3000:]
        seen = ("does not answer: stopped, or out of reach", "activation link 0 -> 1")
        assert any(words in text for words in seen), (host, text[-3000:])
    assert not hosts.processes_left()


def test_units_wait_for_a_cable_and_lose_nothing(hosts, inputs, tmp_path):
    """A unit on each host; the cable is pulled while they train, and put back. The upper one is
    halted while it is pulled, so that the run is not over before."""
    run, config = tmp_path / "run", json.loads(Path(inputs["--deepspeed_config"]).read_text())
    config["local_parallel"] |= {"num_stages": 2, "link": {"reconnect_seconds": 300}}
    path = tmp_path / "units.json"
    path.write_text(json.dumps(config))
    options = {**inputs, "--deepspeed_config": str(path), "--output": str(run)}
    flat = [part for pair in (options | {"--max-steps": STEPS}).items() for part in pair]
    halt = "stop_in", {"where": "train_batch", "nth": 12, "number": signal.SIGSTOP}
    runs = [
        fork(hosts, host, [*flat, "--unit", str(host)], *([halt] if host else []))
        for host in range(2)
    ]

    def steps():
        rows = [run / f"unit-{unit}" / "metrics.jsonl" for unit in range(2)]
        return [len(path.read_text().splitlines()) if path.exists() else 0 for path in rows]

    assert wait_for(lambda: runs[1].is_stopped(0), 500), said(runs)
    hosts.cut()
    runs[1].signal(signal.SIGCONT)
    time.sleep(PULLED_SECONDS)
    before = steps()
    assert all(one.alive() for one in runs), said(runs)
    hosts.plug_in()
    assert all(one.wait(300) for one in runs), said(runs)
    assert [one.status(0) for one in runs] == [0, 0], said(runs)
    one = launch({**inputs, "--output": str(tmp_path / "one"), "--max-steps": STEPS}, timeout=600)
    assert one.returncode == 0, one.stdout
    own = [losses(run / f"unit-{unit}") for unit in range(2)]
    assert own[0] | own[1] == losses(tmp_path / "one")
    assert len(own[1]) > before[1], "a cable that was pulled held it"


@pytest.mark.slow
def test_the_check_measures_the_cable(hosts, inputs):
    hosts.limit(200)
    codes = wait(
        start_everywhere(
            hosts, "check_cluster.py", "--deepspeed_config", inputs["--deepspeed_config"]
        ),
        600,
    )
    text = hosts.outputs()[0]
    assert codes == [0, 0], hosts.outputs()
    assert f"stage 0 -> 1: rank 0 on {NAMES[0]} -> rank 1 on {NAMES[1]}" in text
    assert float(text.partition(" ms, ")[2].split()[0]) < 0.25, "the cable carries 0.2 Gb/s"
    assert "ready" in text


@pytest.mark.slow
def test_a_cut_cable_is_found_before_the_start(hosts, inputs, tmp_path):
    hosts.cut()
    config = json.loads(Path(inputs["--deepspeed_config"]).read_text())
    config["local_parallel"]["layout"] = {"start_timeout_seconds": 15}
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(config))
    arguments = training({**inputs, "--deepspeed_config": str(path)}, tmp_path / "run", 4)
    assert all(wait(start_everywhere(hosts, "train.py", *arguments), 600))
    first, second = hosts.outputs()
    assert "rank 1 of 2 did not come within 15 s" in first, first[-2000:]
    assert f"rank 1 on {NAMES[1]} cannot reach rank 0 at {ADDRESSES[0]}:29777" in second, second[
        -2000:
    ]
