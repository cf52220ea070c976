"""`check` before anything is started: hosts that cannot be reached are named."""

import socket
import subprocess

import pytest
from commands import command
from sentences import assert_one_sentence

from ds_local.cli.check import check_hosts
from ds_local.errors import ClusterError


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("one slots=2\ntwo slots=4\n")
    return str(path)


def answers(monkeypatch, **of_host):
    """What ssh to a host comes to: a status and words, or an error."""
    asked = []

    def run(given, **_):
        asked.append(given)
        found = of_host[given[-2]]
        if isinstance(found, Exception):
            raise found
        return subprocess.CompletedProcess(given, found[0], "", found[1])

    monkeypatch.setattr(socket, "gethostbyname", lambda host: f"10.0.0.{len(host)}")
    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_hosts_that_open_are_listed(hostfile, monkeypatch, capsys):
    asked = answers(monkeypatch, one=(0, ""), two=(0, ""))
    check_hosts(hostfile, 2222)
    assert capsys.readouterr().out == (
        "one (10.0.0.3): 2 slots, opens to ssh\ntwo (10.0.0.3): 4 slots, opens to ssh\n"
    )
    assert all(words[words.index("-p") + 1] == "2222" for words in asked)
    assert all("BatchMode=yes" in words for words in asked)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ((255, "hello\nPermission denied\n"), ["ssh to two", "Permission denied", "ssh-copy-id"]),
        ((1, ""), ["no reason given"]),
        (FileNotFoundError("ssh"), ["there is no ssh on this machine", "--no_ssh"]),
        (subprocess.TimeoutExpired("ssh", 20), ["two (10.0.0.3) did not answer ssh within 20 s"]),
    ],
)
def test_a_host_that_does_not_open_is_named(hostfile, monkeypatch, found, said):
    answers(monkeypatch, one=(0, ""), two=found)
    with pytest.raises(ClusterError) as error:
        check_hosts(hostfile, 22)
    assert_one_sentence(error.value, *said)


def test_a_name_without_an_address_is_named(hostfile, monkeypatch):
    def nobody(host):
        raise socket.gaierror

    monkeypatch.setattr(socket, "gethostbyname", nobody)
    with pytest.raises(ClusterError) as error:
        check_hosts(hostfile, 22)
    assert_one_sentence(error.value, f"the name one in {hostfile} has no address", "/etc/hosts")


def test_without_hosts_and_launcher_there_is_nothing_to_check(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    result = command("check")
    assert result.returncode != 0
    assert_one_sentence(result.stderr.strip(), "give --hostfile, or start this script with")
