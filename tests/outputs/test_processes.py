"""Is a process gone? Its number alone does not say."""

import os
import subprocess
import sys
import time

from ds_local.outputs.processes import Process


def test_this_process_lives():
    own = Process.own()
    assert own.pid == os.getpid()
    assert own.is_gone() is False


def test_a_number_that_was_used_again_is_another_process():
    assert Process.own()._replace(started="1").is_gone() is True


def test_a_process_that_ended_is_gone_even_unburied():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    place = Process.own()
    code = f"from ds_local.outputs.processes import _started; print(_started({process.pid}))"
    started = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    other = place._replace(pid=process.pid, started=started.stdout.strip())
    assert other.is_gone() is False
    process.kill()
    deadline = time.monotonic() + 20
    while not other.is_gone():  # a zombie until somebody asks for its status
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.communicate()
    assert other.is_gone() is True


def test_elsewhere_it_cannot_be_seen():
    assert Process.own()._replace(host="another").is_gone() is None
    assert Process.own()._replace(place="another container").is_gone() is None
