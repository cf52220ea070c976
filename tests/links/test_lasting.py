"""Links that outlive the processes at their ends: an end is closed, or goes silent, and another one
takes its place. Threads stand for the processes."""

import contextlib
import json
import socket
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from device_order import THREAD
from fork_client import wait_for
from standin import standin

from ds_local.errors import TransportError
from ds_local.links.buffers import Tag
from ds_local.links.device import to_device
from ds_local.links.frames import read_frame, send_frame
from ds_local.links.lasting_receiver import LastingReceiver
from ds_local.links.lasting_sender import LastingSender
from ds_local.links.line import END, Line, Place, place_of, start_of

LONG = 60.0
CPU = torch.device("cpu")
NUMBERS = 3  # messages of a step
VALIDATION = [Tag(step=2, micro_batch=-1 - number) for number in range(2)]


@pytest.fixture
def ends(tmp_path):
    """Makes ends of one link, and closes them."""
    with contextlib.ExitStack() as made:

        def make(kind, device=CPU, **changes):
            peer = "unit 1 (stage 1)" if kind is LastingSender else "unit 0 (stage 0)"
            name, folder = "activation link 0 -> 1", tmp_path / "links"
            line = replace(Line(name, folder, peer, "facts", 2, LONG, LONG, LONG), **changes)
            rest = [] if kind is LastingSender else ["127.0.0.1"]
            end = kind(line, device, *rest)
            made.callback(end.close)
            return end

        yield make


def tags(first, last):
    return [Tag(step, number) for step in range(first, last) for number in range(NUMBERS)]


def value(tag, version=0):
    return torch.tensor([100.0 * tag.step + tag.micro_batch, version])


class Sending(threading.Thread):
    """What a unit does below a link: it agrees on the first step and sends."""

    def __init__(self, sender, own, last, version=0, more=()):
        super().__init__(daemon=True)
        self.sender, self.own, self.last, self.version = sender, own, last, version
        self.more, self.begins, self.error = more, None, None
        self.start()

    def run(self):
        try:
            self.begins = min(self.own, self.sender.wants(self.own))
            self.sender.begin_at(self.begins)
            for tag in sorted([*tags(self.begins, self.last), *self.more], key=place_of):
                self.sender.send(tag, {"x": value(tag, self.version)})
        except TransportError as error:
            self.error = error

    def ended(self):
        self.join(LONG)
        assert not self.is_alive()
        assert self.error is None, self.error


def take(receiver, wanted):
    """Versions of the messages for these tags; their numbers are as they should be."""
    versions = []
    for tag in wanted:
        found, message = receiver.receive(tag)
        assert found == tag
        assert message["x"][0] == value(tag)[0]
        versions.append(int(message["x"][1]))
    return versions


# --- one stream -----------------------------------------------------------------------------------


def test_places_follow_each_other():
    assert place_of(Tag(3, 1)) == Place(3, 1, 1)
    assert place_of(Tag(3, -2)) == Place(3, 0, 1)
    order = [start_of(3), place_of(Tag(3, -1)), place_of(Tag(3, -2)), place_of(Tag(3, 0))]
    assert order == sorted(order)
    assert place_of(Tag(2, 99)) < start_of(3)


def test_all_comes_once_and_in_order_a_validation_before_its_step(ends):
    sending = Sending(ends(LastingSender), 0, 4, more=VALIDATION)
    receiver = ends(LastingReceiver)
    assert receiver.begin_at(0) == 0
    take(receiver, sorted([*tags(0, 4), *VALIDATION], key=place_of))
    sending.ended()
    assert not receiver._come
    assert receiver.num_bytes == sending.sender.num_bytes > 0


def test_on_a_device_its_thread_stands_there_and_pinned_memory_is_not_kept(ends):
    device = torch.device("cuda", 1)
    with standin(1) as faults:
        sender, receiver = ends(LastingSender, device), ends(LastingReceiver)
        versions = []

        def receive():
            receiver.begin_at(0)
            versions.extend(take(receiver, tags(0, 2)))

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        sender.begin_at(sender.wants(0))
        for tag in tags(0, 2):
            sender.send(tag, {"x": to_device(value(tag, 7), device)})
        thread.join(LONG)
        assert faults == []
        assert versions == [7] * len(tags(0, 2))
        assert len(sender._held) == len(versions)  # until the receiver has a checkpoint
        assert not any(held.buffer.is_pinned() for held in sender._held)


def test_its_threads_stand_on_the_device_that_they_pin_memory_for(ends):
    stands, device = [], torch.device("cuda", 1)

    def buffer(size):
        stands.append(THREAD.device)
        return torch.empty(size, dtype=torch.uint8)

    with standin(1):
        receiver = ends(LastingReceiver)
        moves = receiver._staging.to_device
        receiver._staging = SimpleNamespace(device=device, buffer=buffer, to_device=moves)
        sending = Sending(ends(LastingSender), 0, 1)
        receiver.begin_at(0)
        take(receiver, tags(0, 1))
        sending.ended()
    assert stands == [1] * NUMBERS


def test_tensors_of_any_kind_and_shape_come_as_they_were(ends):
    sender, receiver = ends(LastingSender), ends(LastingReceiver)
    messages = [
        {
            "x": torch.randn(2, 3, dtype=torch.bfloat16),
            "ids": torch.arange(5),
            "none": torch.zeros(0),
        },
        {"x": torch.randn(7, 1).t()},
        {"flag": torch.tensor(True)},
        {"empty": torch.zeros(0, 4)},
    ]
    tag_of = [Tag(0, number) for number in range(len(messages))]

    def feed():
        sender.begin_at(0)
        for tag, message in zip(tag_of, messages, strict=True):
            sender.send(tag, message)
            for tensor in message.values():
                tensor.zero_()  # the link has a copy

    copies = [{name: tensor.clone() for name, tensor in one.items()} for one in messages]
    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    receiver.begin_at(0)
    for tag, copy in zip(tag_of, copies, strict=True):
        message = receiver.receive(tag)[1]
        assert message.keys() == copy.keys()
        assert all(torch.equal(message[name], copy[name]) for name in copy)
        assert all(message[name].dtype == copy[name].dtype for name in copy)
    thread.join(LONG)


def test_a_sender_waits_while_depth_messages_are_not_taken(ends):
    sender, receiver = ends(LastingSender), ends(LastingReceiver)
    sending = Sending(sender, 0, 2)
    receiver.begin_at(0)
    assert wait_for(lambda: len(receiver._come) == 2, LONG)
    sending.join(0.2)
    assert sending.is_alive()
    assert len(sender._held) == 2
    take(receiver, tags(0, 2))
    sending.ended()


def test_what_is_needed_no_more_is_let_go_of(ends):
    sender, receiver = ends(LastingSender), ends(LastingReceiver)
    sending = Sending(sender, 0, 3)
    receiver.begin_at(0)
    take(receiver, tags(0, 3))
    sending.ended()
    assert len(sender._held) == 9
    receiver.done_before(2)
    assert wait_for(lambda: len(sender._held) == NUMBERS, LONG)
    receiver.done_before(1)  # earlier: nothing new
    assert sender.needed == 2


# --- the receiver dies ----------------------------------------------------------------------------


def test_a_new_receiver_has_once_more_what_it_needs(ends):
    sender, receiver = ends(LastingSender), ends(LastingReceiver)
    sending = Sending(sender, 0, 4)
    receiver.begin_at(0)
    take(receiver, tags(0, 1))
    receiver.done_before(1)
    take(receiver, tags(1, 2)[:2])
    receiver.close()
    receiver = ends(LastingReceiver)
    assert receiver.begin_at(1) == 1
    take(receiver, tags(1, 4))
    sending.ended()


def test_a_new_receiver_is_told_where_messages_begin_that_are_still_there(ends):
    sender, receiver = ends(LastingSender), ends(LastingReceiver)
    sending = Sending(sender, 0, 5)
    receiver.begin_at(0)
    take(receiver, tags(0, 3))
    receiver.done_before(3)
    assert wait_for(lambda: sender.needed == 3, LONG)
    receiver.close()
    receiver = ends(LastingReceiver)
    assert receiver.begin_at(1) == 3  # its checkpoint was older
    take(receiver, tags(3, 5))
    sending.ended()


def test_a_receiver_that_hangs_is_left_for_the_one_that_took_its_place(ends):
    """Its connection stands, as that of a machine that is gone does for a while."""
    sender, former = ends(LastingSender), ends(LastingReceiver)
    sending = Sending(sender, 0, 3)
    former.begin_at(0)
    take(former, tags(0, 1)[:1])
    receiver = ends(LastingReceiver)
    assert receiver.begin_at(0) == 0
    take(receiver, tags(0, 3))
    sending.ended()


# --- the sender dies ------------------------------------------------------------------------------


def test_a_new_sender_sends_what_has_not_come_and_nothing_twice(ends):
    sender, receiver = ends(LastingSender), ends(LastingReceiver)
    first = Sending(sender, 0, 1, more=[Tag(1, 0)])
    receiver.begin_at(0)
    take(receiver, tags(0, 1)[:2])
    first.ended()
    assert wait_for(lambda: Place(1, 1, 0) in receiver._come, LONG)
    sender.close()
    second = Sending(ends(LastingSender), 0, 3, version=1)
    versions = take(receiver, tags(0, 3)[2:])
    assert versions == [0, 0, 1, 1, 1, 1, 1]  # two had come from the one before
    second.ended()
    assert second.begins == 0  # from its checkpoint on it computes all, and sends what is new


def test_what_a_former_sender_sent_is_taken_before_what_is_new(ends):
    sender, receiver = ends(LastingSender), ends(LastingReceiver)
    first = Sending(sender, 0, 0, more=tags(0, 1)[:2])
    receiver.begin_at(0)
    first.ended()
    assert wait_for(lambda: len(receiver._come) == 2, LONG)
    sender.close()
    second = Sending(ends(LastingSender), 0, 1, version=1)
    assert take(receiver, tags(0, 1)) == [0, 0, 1]
    second.ended()


def test_a_sender_that_hangs_is_left_for_the_one_that_took_its_place(ends):
    hanging, receiver = ends(LastingSender), ends(LastingReceiver)
    first = Sending(hanging, 0, 0, more=tags(0, 1)[:1])
    receiver.begin_at(0)
    assert take(receiver, tags(0, 1)[:1]) == [0]
    first.ended()
    second = Sending(ends(LastingSender), 0, 1, version=1)
    assert take(receiver, tags(0, 1)[1:]) == [1, 1]
    second.ended()
    with pytest.raises(TransportError, match=r"taken the place of unit 0 .*; end this one"):
        hanging.drain()


def test_of_two_senders_that_greet_at_once_one_stays(ends):
    """The one that came first answers last, when the other has its place already."""
    receiver = ends(LastingReceiver)
    card, address = address_of(receiver)
    begins = threading.Thread(target=receiver.begin_at, args=(0,), daemon=True)
    begins.start()
    former, newest = (socket.create_connection(address) for _ in range(2))
    with former, newest:
        for number, connection in enumerate([former, newest]):
            send_frame(connection, hello_of(card, receiver, str(number)))
            assert read_frame(connection)[0] == {"wants": 0}
        for connection in [newest, former]:
            send_frame(connection, {"first": 0})
        with pytest.raises(ConnectionError):
            read_frame(former)
        assert read_frame(newest)[0]["needed"] == 0
        receiver.done_before(1)
        assert read_frame(newest)[0] == {"needed": 1}
    begins.join(LONG)


def test_a_sender_that_comes_back_too_late_ends_the_receiver_with_a_sentence(ends):
    sender, receiver = ends(LastingSender), ends(LastingReceiver)
    first = Sending(sender, 0, 0, more=tags(0, 1)[:1])
    receiver.begin_at(0)
    take(receiver, tags(0, 1)[:1])
    first.ended()
    sender.close()
    ends(LastingSender).begin_at(4)
    with pytest.raises(TransportError, match=r"unit 0 \(stage 0\) came back at step 4, but step 0"):
        receiver.receive(Tag(0, 1))


# --- ends that do not go together -----------------------------------------------------------------


def test_another_configuration_is_refused_at_both_ends(ends):
    receiver, sender = ends(LastingReceiver), ends(LastingSender, facts="others")
    said = "were not started with the same model, data and configuration; start both with the same"
    with pytest.raises(TransportError, match=said):
        sender.wants(0)
    with pytest.raises(TransportError, match=said):
        receiver.begin_at(0)


@pytest.mark.parametrize(
    ("kind", "act"),
    [
        (LastingSender, lambda end: end.wants(0)),
        (LastingReceiver, lambda end: end.begin_at(0)),
        (LastingSender, lambda end: end.drain()),
    ],
)
def test_a_peer_that_stays_away_is_named(ends, kind, act):
    end = ends(kind, reconnect_seconds=0.2)
    with pytest.raises(TransportError) as caught:
        act(end)
    assert end.line.peer in str(caught.value)
    assert "has been away for" in str(caught.value)
    assert str(caught.value).endswith("raise local_parallel.link.reconnect_seconds")


def test_a_peer_that_is_there_and_does_nothing_is_named(ends):
    how = {"timeout_seconds": 0.2, "reconnect_seconds": 0.2}
    sender, receiver = ends(LastingSender, **how), ends(LastingReceiver)
    sending = Sending(sender, 0, 1)
    receiver.begin_at(0)
    sending.join(LONG)
    said = "waited for unit 1 (stage 1) to take a message (step 0, micro-batch 2 is next), but "
    assert said in str(sending.error)


def test_a_message_of_another_place_is_told(ends):
    sending = Sending(ends(LastingSender), 0, 1)
    receiver = ends(LastingReceiver)
    receiver.begin_at(0)
    with pytest.raises(TransportError, match=r"brought step 0, micro-batch 0, .*expected step 5"):
        receiver.receive(Tag(5, 0))
    assert sending.is_alive() or sending.error is None


# --- strangers ------------------------------------------------------------------------------------


def address_of(receiver):
    card = json.loads(receiver.line.card.read_text())
    return card, (card["host"], card["port"])


def hello_of(card, receiver, sender):
    facts = {"link": receiver.name, "facts": receiver.line.facts}
    return {"secret": card["secret"], **facts, "sender": sender}


DEEP = 1 << 17  # brackets, more than any parser follows


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 64,
        b"\x02\x00\x00\x00" + bytes(8) + b"[]",
        DEEP.to_bytes(4, "little") + bytes(8) + b"[" * DEEP,
    ],
)
def test_what_is_no_sender_is_ignored(ends, junk):
    receiver = ends(LastingReceiver)
    with socket.create_connection(address_of(receiver)[1]) as stranger:
        stranger.settimeout(LONG)
        with contextlib.suppress(OSError):  # it may have been sent away already
            stranger.sendall(junk)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
    sending = Sending(ends(LastingSender), 0, 1)
    receiver.begin_at(0)
    take(receiver, tags(0, 1))
    sending.ended()


def test_one_that_greets_and_goes_silent_keeps_nobody_out(ends):
    receiver = ends(LastingReceiver)
    card, address = address_of(receiver)
    with socket.create_connection(address) as silent:
        send_frame(silent, hello_of(card, receiver, "silent"))
        sending = Sending(ends(LastingSender), 0, 1)
        receiver.begin_at(0)
        take(receiver, tags(0, 1))
        sending.ended()


# --- the end --------------------------------------------------------------------------------------


def test_a_sender_waits_until_the_receiver_has_ended(ends):
    sender, receiver = ends(LastingSender), ends(LastingReceiver)
    sending = Sending(sender, 0, 1)
    receiver.begin_at(0)
    take(receiver, tags(0, 1))
    sending.ended()
    waits = threading.Thread(target=sender.drain, daemon=True)
    waits.start()
    waits.join(0.2)
    assert waits.is_alive()
    receiver.end(finished=False)
    waits.join(LONG)
    assert not waits.is_alive()


def test_a_sender_that_was_away_hears_of_the_end(ends):
    sender, receiver = ends(LastingSender), ends(LastingReceiver)
    sending = Sending(sender, 0, 1)
    receiver.begin_at(0)
    take(receiver, tags(0, 1))
    sending.ended()
    sender.close()
    receiver.end(finished=True)
    again = ends(LastingSender)
    assert again.wants(1) == END
    again.begin_at(0)
    again.send(Tag(0, 0), {"x": value(Tag(0, 0))})  # nobody needs it
    again.drain()


def test_a_receiver_knows_that_one_before_it_has_ended(ends):
    first = ends(LastingReceiver)
    assert not first.had_ended
    first.end(finished=False)
    second = ends(LastingReceiver)
    assert not second.had_ended
    second.end(finished=True)
    assert not ends(LastingReceiver, facts="of a longer run").had_ended  # its address is there now
    ends(LastingReceiver).end(finished=True)
    for _ in range(3):  # killed before it has ended once more
        assert ends(LastingReceiver).had_ended
    sending = Sending(ends(LastingSender), 1, 2)  # it is met as any other
    again = ends(LastingReceiver)
    assert again.begin_at(1) == 1
    assert take(again, tags(1, 2)) == [0] * NUMBERS
    sending.ended()


def test_the_end_of_an_earlier_run_is_no_end_of_this_one(ends):
    """A sender at its beginning, beside files of a run that has ended."""
    ends(LastingReceiver).end(finished=True)
    sender = ends(LastingSender)
    with pytest.raises(TransportError, match=r"has ended by .*json, but .* at its beginning"):
        sender.wants(0)


def test_steps_of_the_receiver_are_heard_while_the_sender_waits_for_its_end(ends):
    sender, receiver, heard = ends(LastingSender), ends(LastingReceiver), []
    sending = Sending(sender, 0, 3)
    receiver.begin_at(0)
    take(receiver, tags(0, 3))
    sending.ended()
    waits = threading.Thread(target=sender.drain, args=[heard.append], daemon=True)
    waits.start()
    receiver.done_before(2)
    assert wait_for(lambda: heard, LONG)
    receiver.end(finished=False)
    waits.join(LONG)
    assert heard == [2, END]


def test_an_address_that_no_other_machine_can_reach_is_said(ends):
    receiver = ends(LastingReceiver)
    card = json.loads(receiver.line.card.read_text())
    receiver.line.card.write_text(json.dumps(card | {"machine": "elsewhere"}))
    with pytest.raises(TransportError, match=r"elsewhere resolves to its loopback .*SOCKET_IFNAME"):
        ends(LastingSender).wants(0)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_wish_to_stop_comes_down(ends, is_there):
    heard = threading.Event()
    receiver = ends(LastingReceiver)
    if not is_there:
        receiver.stop()
    sender = ends(LastingSender)
    sender.ask_to_stop = heard.set
    sending = Sending(sender, 0, 1)
    receiver.begin_at(0)
    if is_there:
        receiver.stop()
    assert heard.wait(LONG)
    take(receiver, tags(0, 1))
    sending.ended()


# --- frames ---------------------------------------------------------------------------------------


def test_frames_bring_text_and_bytes():
    one, other = socket.socketpair()
    data = torch.arange(300, dtype=torch.uint8)
    send_frame(one, {"step": 3}, data)
    send_frame(one, {"taken": [1, 2]})
    said, found = read_frame(other, lambda size: torch.empty(size, dtype=torch.uint8))
    assert said == {"step": 3}
    assert torch.equal(found, data)
    assert read_frame(other) == ({"taken": [1, 2]}, None)
    send_frame(one, {}, data)
    with pytest.raises(ConnectionError, match="no frame"):
        read_frame(other)  # bytes where there must be none
    one.close()
    other.close()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "has closed"),
        (b"\x05\x00", "has closed"),
        (b"\xff" * 12, "no frame"),
        (b"\x02\x00\x00\x00" + bytes(8) + b"{x", "no frame"),
        (b"\x02\x00\x00\x00" + bytes(8) + b"[]", "no frame"),
    ],
)
def test_what_is_no_frame_is_an_error_of_the_connection(raw, said):
    one, other = socket.socketpair()
    one.sendall(raw)
    one.close()
    with pytest.raises(ConnectionError, match=said):
        read_frame(other)
    other.close()
