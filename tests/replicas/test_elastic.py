"""Replicas that are jobs of their own: means of whoever is there, by hand, through deaths."""

import errno
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fork_client import wait_for

from ds_local.errors import SaveError, TransportError
from ds_local.replicas.elastic import ElasticGroup
from ds_local.replicas.members import MeetingPlace

LONG = 60.0


@pytest.fixture
def replica(tmp_path):
    """Makes a replica's part in the group; all are closed at the end."""
    made = []

    def make(number, count, facts="same", reconnect=LONG):
        place = MeetingPlace("unit 1", tmp_path, facts, LONG, reconnect)
        made.append(ElasticGroup(number, count, place, "127.0.0.1"))
        return made[-1]

    yield make
    for group in made:
        group.close()


@pytest.fixture
def at_once():
    """Runs functions side by side; their results in order."""
    with ThreadPoolExecutor(8) as pool:
        yield lambda *functions: [
            future.result(LONG) for future in [pool.submit(function) for function in functions]
        ]


def numbers(*values):
    return torch.tensor(values, dtype=torch.float32)


def joined(at_once, groups, steps=None):
    steps = steps or [0] * len(groups)
    return at_once(*(lambda g=g, s=s: g.join(s) for g, s in zip(groups, steps, strict=True)))


def means(at_once, step, given, size=2, final=True):
    """Of (group, numbers) pairs."""
    return at_once(*(lambda g=g, n=n: g.average(step, n, size, final) for g, n in given))


def test_the_mean_of_all_in_the_order_of_replicas(replica, at_once):
    groups = [replica(n, 3) for n in range(3)]
    assert joined(at_once, groups) == [(0, None)] * 3
    given = [numbers(1e8, 1), numbers(1, 2), numbers(-1e8, 6)]  # fp32: (1e8 + 1) - 1e8 = 0
    found = means(at_once, 0, list(zip(groups, given, strict=True)))
    for mean in found:
        assert mean.present == 3
        assert mean.numbers.tolist() == [0.0, 3.0]


def test_who_has_nothing_takes_the_mean_of_the_others(replica, at_once):
    groups = [replica(n, 3) for n in range(3)]
    joined(at_once, groups)
    found = means(at_once, 0, list(zip(groups, [numbers(2, 4), None, numbers(4, 8)], strict=True)))
    assert [mean.numbers.tolist() for mean in found] == [[3.0, 6.0]] * 3
    assert {mean.present for mean in found} == {2}


def test_where_nobody_has_anything_yet_all_try_again(replica, at_once):
    groups = [replica(n, 2) for n in range(2)]
    joined(at_once, groups)
    given = [(group, None) for group in groups]
    assert means(at_once, 0, given, final=False) == [None, None]
    never = means(at_once, 0, given, final=True)
    assert [mean.present for mean in never] == [0, 0]


@pytest.mark.parametrize("dies", [0, 1, 2], ids=["the leader", "the second", "the last"])
def test_the_others_go_on_when_one_dies(replica, at_once, dies):
    groups = [replica(n, 3) for n in range(3)]
    joined(at_once, groups)
    given = [numbers(3, 0), numbers(6, 0), numbers(9, 3)]
    means(at_once, 0, list(zip(groups, given, strict=True)))
    groups[dies].close()
    left = [(groups[n], given[n]) for n in range(3) if n != dies]
    wanted = (sum(n for _, n in left) / 2).tolist()
    for step in (1, 2):
        found = means(at_once, step, left)
        assert [mean.numbers.tolist() for mean in found] == [wanted] * 2
    assert {tuple(sorted(group.members)) for group, _ in left} == {
        tuple(n for n in range(3) if n != dies)
    }


def test_a_mean_that_only_some_got_from_a_leader_that_died_is_passed_on(replica, at_once):
    """Replica 2 has the mean of step 0, the leader dies, replica 1 lacks it."""
    groups = [replica(n, 3) for n in range(3)]
    joined(at_once, groups)
    send = groups[0]._send_mean

    def send_to_the_last_alone(to, mean):
        if to == 2:
            send(to, mean)

    groups[0]._send_mean = send_to_the_last_alone
    with ThreadPoolExecutor(4) as pool:
        waits = pool.submit(groups[1].average, 0, numbers(2, 2), 2)
        last = pool.submit(groups[2].average, 0, numbers(6, 2), 2)
        first = groups[0].average(0, numbers(1, 5), 2)
        assert last.result(LONG).numbers.tolist() == first.numbers.tolist() == [3.0, 3.0]
        following = pool.submit(groups[2].average, 1, numbers(8, 0), 2)
        groups[0].close()
        assert waits.result(LONG).numbers.tolist() == [3.0, 3.0]  # of all three
        mean = groups[1].average(1, numbers(4, 2), 2)
        assert mean.numbers.tolist() == following.result(LONG).numbers.tolist() == [6.0, 1.0]


def test_a_contribution_to_one_that_does_not_know_yet_that_it_leads_is_kept(replica, at_once):
    """Replica 2 finds out first that the leader is dead, and sends to replica 1, which still waits
    for the leader."""
    groups = [replica(n, 3) for n in range(3)]
    joined(at_once, groups)
    stays = groups[1]._connections[0]
    with ThreadPoolExecutor(2) as pool:
        follows = pool.submit(groups[1].average, 0, numbers(2, 2), 2)
        leaves = pool.submit(groups[2].average, 0, numbers(4, 6), 2)
        groups[0].place.card(0).write_text("{}")  # dead for whoever looks
        groups[0]._connections[2].shutdown(socket.SHUT_RDWR)
        assert wait_for(lambda: groups[1]._early, LONG)
        stays.shutdown(socket.SHUT_RDWR)
        found = [one.result(LONG) for one in (follows, leaves)]
    assert [mean.numbers.tolist() for mean in found] == [[3.0, 4.0]] * 2


def test_a_full_disk_ends_no_replica(replica, at_once, monkeypatch):
    """Who is there is agreed on by the names of files, and whoever cannot be given the weights asks
    again."""
    groups = [replica(n, 2) for n in range(2)]
    joined(at_once, groups)
    groups[1].close()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert groups[0].average(0, numbers(1, 1), 2).present == 1
    monkeypatch.undo()
    again = replica(1, 2)
    saves = []

    def save():
        saves.append(len(saves))
        if saves == [0]:
            raise SaveError("no room")
        return ["folder", "step1"]

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(again.join, 0)
        while not coming.done():
            groups[0].admit(1, save)
            time.sleep(0.01)
        assert coming.result() == (1, ["folder", "step1"])
    assert len(saves) == 2


def test_members_hear_at_once_who_is_left_out(replica, at_once):
    groups = [replica(n, 3) for n in range(3)]
    joined(at_once, groups)
    groups[2].close()
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(groups[1].average, 0, numbers(1, 1), 2)
        with groups[0]._lock:
            groups[0]._new_epoch([0, 1])
        assert wait_for(lambda: groups[1].members == [0, 1], LONG)
        groups[0].average(0, numbers(3, 3), 2)
        assert waits.result(LONG).numbers.tolist() == [2.0, 2.0]


def test_a_replica_comes_back_between_two_steps(replica, at_once):
    groups = [replica(n, 2) for n in range(2)]
    joined(at_once, groups)
    means(at_once, 0, [(groups[0], numbers(1, 1)), (groups[1], numbers(3, 3))])
    groups[0].close()  # it led
    alone = groups[1].average(1, numbers(5, 5), 2)
    assert (alone.present, alone.numbers.tolist()) == (1, [5.0, 5.0])
    again, saved = replica(0, 2), []

    def save():
        saved.append(step)
        return ["folder", f"step{step}"]

    step = 2
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(again.join, 0)
        while not coming.done():  # it comes in where the leader is between two steps
            groups[1].average(step, numbers(5, 5), 2)
            step += 1
            groups[1].admit(step, save)
            time.sleep(0.01)
            if saved:
                break
        assert coming.result(LONG) == (saved[0], ["folder", f"step{saved[0]}"])
    (done,) = saved
    found = means(at_once, done, [(groups[1], numbers(1, 1)), (again, numbers(3, 3))])
    assert [mean.numbers.tolist() for mean in found] == [[2.0, 2.0]] * 2
    assert groups[1].members == again.members == [1, 0]


def test_all_begin_where_the_furthest_is(replica, at_once):
    groups = [replica(n, 3) for n in range(3)]
    found = joined(at_once, groups, [10, 30, 20])
    assert found == [(30, ["replica 1", "global_step30"]), (30, None), found[0]]
    mean = means(at_once, 30, [(group, numbers(n, n)) for n, group in enumerate(groups)])[0]
    assert mean.numbers.tolist() == [1.0, 1.0]
    assert groups[0].members[0] == 1


def test_one_that_comes_after_the_end_is_told_so(replica, at_once):
    groups = [replica(n, 2) for n in range(2)]
    joined(at_once, groups)
    groups[1].end(finished=True, step=7)
    groups[0].close()
    assert replica(0, 2).join(3) == (7, ["replica 1", "global_step7"])


def test_without_the_others_the_sentence_names_them(replica):
    with pytest.raises(TransportError, match=r"replica 1 of unit 1 waited .*missing here: 0, 2"):
        replica(1, 3, reconnect=0.5).join(0)


def test_another_configuration_is_refused(replica):
    replica(0, 2)
    other = replica(1, 2, facts="another", reconnect=5.0)
    with pytest.raises(TransportError, match="same model, data and configuration"):
        other.join(0)


def test_of_two_that_take_each_other_for_dead_one_goes_on(replica, at_once):
    groups = [replica(n, 2) for n in range(2)]
    joined(at_once, groups)
    groups[1]._new_epoch([1])
    with pytest.raises(TransportError, match="took replica 0 for dead"):
        groups[0]._new_epoch([0])
