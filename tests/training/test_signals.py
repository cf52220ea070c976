"""Real signals to real processes: before there is anything to save, after, and twice."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ds_local.training.signals import is_launcher

ROOT = Path(__file__).parents[2]
# says READY, then STOP for each call of the stop; ends with 0 once it has been asked and told
SCRIPT = """
import sys, threading
sys.path.insert(0, {root!r})
from ds_local.training import signals
signals.SAME_SECONDS = {same}
asked = threading.Event()
def stop():
    print("STOP", flush=True)
    asked.set()
with signals.Signals() as heard:
    if {begun}:
        heard.stop_with(stop, may_die_alone={alone})
    print("READY", flush=True)
    lock = threading.Lock(); lock.acquire()
    {then}
"""
WAITS = "lock.acquire()"  # for ever, as in C code
# not before all signals of a test have come
LEAVES = "import time; asked.wait(); time.sleep(0.5); print('SAVED', flush=True)"


def start(then=LEAVES, begun=True, same=60.0, command=(sys.executable,), alone=False, **how):
    code = SCRIPT.format(root=str(ROOT), then=then, begun=begun, same=same, alone=alone)
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | how
    process = subprocess.Popen([*command, "-c", code], **how)
    assert process.stdout.readline() == "READY\n"
    return process


def end(process):
    """(status, what it said)"""
    limit = threading.Timer(60, process.kill)
    limit.start()
    try:
        # `communicate` would miss what has come together with a line that was read before
        output = process.stdout.read()
        return process.wait(), output
    finally:
        limit.cancel()
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_before_the_first_step_there_is_nothing_to_save(number):
    process = start(WAITS, begun=False)
    process.send_signal(number)
    status, output = end(process)
    assert status == 128 + number
    assert output.split()[0] == number.name
    assert "nothing to save" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_once_while_the_main_thread_is_elsewhere(number):
    process = start()
    for _ in range(3):
        process.send_signal(number)
    assert end(process) == (0, "STOP\nSAVED\n")


def test_a_second_interrupt_leaves_at_once():
    process = start(WAITS, same=0.0)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "STOP\n"
    process.send_signal(signal.SIGTERM)  # a launcher passes on what a terminal sent: no second one
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    status, output = end(process)
    assert status == 128 + signal.SIGINT
    assert "a second SIGINT" in output


def test_nohup_keeps_its_word():
    ignoring = (
        "import signal, os, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    process = start(command=(sys.executable, "-c", ignoring))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert end(process) == (0, "STOP\nSAVED\n")


def test_a_console_that_is_gone_stops_no_save(tmp_path):
    saved = tmp_path / "saved"
    printed = "[print('x' * 100000, flush=True) for _ in range(9)]"
    then = f"asked.wait(); {printed}; open({str(saved)!r}, 'w')"
    process = start(then)
    process.stdout.close()  # as a terminal does
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert saved.exists()


def test_a_forked_child_has_its_own_signals():
    then = (
        "import os, signal, time; child = os.fork(); child or time.sleep(600); os.kill(child, "
        "signal.SIGTERM); print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "
        "asked.is_set(), flush=True)"
    )
    assert end(start(then)) == (0, f"{-signal.SIGTERM} False\n")


def test_a_launcher_that_is_killed_asks_for_a_stop(tmp_path):
    launcher = tmp_path / "torchrun"  # by its name
    launcher.write_text("import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()")
    process = start(command=(sys.executable, str(launcher), sys.executable))
    process.kill()
    assert process.stdout.read() == "STOP\nSAVED\n"
    process.wait()


def test_what_may_die_alone_dies_with_its_launcher(tmp_path):
    launcher = tmp_path / "torchrun"
    launcher.write_text("import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()")
    process = start(command=(sys.executable, str(launcher), sys.executable), alone=True)
    process.kill()
    said = process.stdout.read().strip()
    assert (
        said == f"the launcher (process {process.pid}) is gone: left at once, to be started again"
    )
    process.wait()


@pytest.mark.parametrize(
    ("words", "launches"),
    [
        (["/usr/bin/python3", "/env/bin/deepspeed", "--num_gpus", "2"], True),
        (["/env/bin/python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"], True),
        (["/env/bin/python3.11", "/env/bin/torchrun", "train.py"], True),
        (["python", "-m", "torch.distributed.run", "train.py"], True),
        (["torchrun", "train.py"], True),
        (["/env/bin/python", "/env/bin/accelerate", "launch", "train.py"], True),
        (["bash", "run.sh", "deepspeed"], False),
        (["python", "-m", "pytest", "tests"], False),
        (["python", "train.py", "--deepspeed", "--x", "deepspeed"], False),
        (["nohup", "/env/bin/deepspeed"], False),
        ([], False),
    ],
)
def test_launchers_are_known_by_their_command_line(words, launches):
    assert is_launcher(words) is launches


def test_this_process_is_left_as_it_was():
    from ds_local.training.signals import SIGNALS, Signals

    before = [signal.getsignal(number) for number in SIGNALS]
    with Signals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
