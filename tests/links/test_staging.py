"""Messages between a device and its link, on a pretended device; and what the stand-in itself finds
wrong."""

import threading
from datetime import timedelta

import pytest
import torch
from device_order import Event, Stream
from standin import standin

from ds_local.links.device import to_device
from ds_local.links.staging import Departures, Staging

DEVICE = torch.device("cuda", 1)
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64}


class Arrival:
    def wait(self, limit):
        pass


def kinds(faults):
    return [fault.kind for fault in faults]


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_comes_as_it_was_and_nobody_waits(kind):
    message = {"x": torch.arange(12).view(3, 4).to(KINDS[kind]), "y": torch.tensor(7)}
    with standin(1) as faults:
        sent = {name: to_device(tensor, DEVICE) + 0 for name, tensor in message.items()}
        here, there = Staging(DEVICE), Staging(torch.device("cuda"))
        assert there.device == DEVICE  # the one that this thread is on
        views = {name: torch.empty_like(t, pin_memory=True) for name, t in message.items()}
        copied = here.to_host(views, sent)
        del sent
        landed = {name: torch.empty_like(t, pin_memory=True) for name, t in message.items()}

        def travel():
            for name, view in views.items():
                landed[name].copy_(view)
            return Arrival()

        Departures(DEVICE).after(copied, travel).wait(timedelta(seconds=10))
        came = there.to_device(landed)
        sums = {name: tensor + tensor for name, tensor in came.items()}
        assert kinds(faults) == []
        for name, tensor in message.items():
            assert sums[name].device == DEVICE
            assert torch.equal(sums[name].cpu(), tensor + tensor)
    assert kinds(faults) == ["wait", "wait"]  # the test's own reads


# --- the stand-in ---------------------------------------------------------------------------------


@pytest.fixture
def faults():
    with standin(1) as found:
        yield found


@pytest.fixture
def tensor(faults):
    return torch.ones(4, device=DEVICE)


HOST_READS = {
    "item": lambda t: t[0].item(),
    "float": lambda t: float(t.sum()),
    "bool": lambda t: bool(t.sum() > 0),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu", non_blocking=True),  # to memory that is not pinned
    "nonzero": lambda t: t.nonzero(),
    "mask": lambda t: t[t > 0],
    "masked_select": lambda t: t.masked_select(t > 0),
    "index of the host": lambda t: t[torch.tensor([0, 1])],
    "pageable": lambda t: torch.ones(4).to(DEVICE, non_blocking=True),
    "blocking": lambda t: torch.ones(4).pin_memory().to(DEVICE),
    "tensor": lambda t: torch.tensor([1.0], device=DEVICE),
    "copy_": lambda t: t.copy_(torch.ones(4)),
    "stream": lambda t: torch.cuda.current_stream().synchronize(),
    "device": lambda t: torch.cuda.synchronize(),
    "event": lambda t: torch.cuda.current_stream().record_event(Event(blocking=True)).synchronize(),
}


@pytest.mark.parametrize("read", HOST_READS)
def test_what_makes_the_host_wait(read, faults, tensor):
    HOST_READS[read](tensor)
    assert kinds(faults) == ["wait"]


QUIET = {
    "numbers of Python": lambda t: t * 2 + 1,
    "a scalar of the host": lambda t: t * torch.tensor(2.0),
    "where": lambda t: torch.where(t > 0, t, 0),
    "an index of the device": lambda t: t[torch.zeros(2, dtype=torch.long, device=DEVICE)],
    "pinned": lambda t: torch.ones(4).pin_memory().to(DEVICE, non_blocking=True),
    "a fill": lambda t: torch.full((3,), 2.0, device=DEVICE).zero_(),
    "another dtype": lambda t: t.to(torch.bfloat16).double(),
}


@pytest.mark.parametrize("done", QUIET)
def test_what_does_not(done, faults, tensor):
    QUIET[done](tensor)
    assert faults == []


def test_tensors_of_two_devices_do_not_meet(tensor):
    with pytest.raises(RuntimeError, match="same device"):
        tensor + torch.ones(4)


def test_a_stream_must_wait_for_the_one_that_writes(faults, tensor):
    side = Stream(DEVICE)
    with torch.cuda.stream(side):
        double = tensor * 2
    assert kinds(faults) == ["order"]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tensor.add_(double)
    event = side.record_event()
    with torch.cuda.stream(side):
        tensor.add_(1)
    torch.cuda.current_stream().wait_event(event)  # recorded before the newest write
    _ = tensor + 1
    assert kinds(faults) == ["order", "order"]


def test_half_a_tensor_is_another_tensor(faults):
    whole, side = torch.zeros(8, device=DEVICE), Stream(DEVICE)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        whole[:4].add_(1)
    whole[4:].add_(1)
    assert faults == []
    whole[3:].add_(1)
    assert kinds(faults) == ["order"]


@pytest.mark.parametrize("how", ["not", "record_stream", "wait_stream"])
def test_memory_goes_back_when_nobody_uses_it(how, faults):
    first, side = torch.cuda.current_stream(DEVICE), Stream(DEVICE)
    tensor = torch.ones(4, device=DEVICE)
    side.wait_stream(first)
    with torch.cuda.stream(side):
        _ = tensor * 2
    if how == "record_stream":
        tensor.record_stream(side)
    del tensor
    if how == "wait_stream":
        first.wait_stream(side)
    torch.ones(4, device=DEVICE)
    assert kinds(faults) == (["freed"] if how == "not" else [])


def test_pinned_memory_is_not_written_while_it_is_copied(faults):
    pinned = torch.ones(4).pin_memory()
    there = pinned.to(DEVICE, non_blocking=True)
    pinned.zero_()
    assert kinds(faults) == ["reuse"]
    pinned.copy_(there, non_blocking=True)
    pinned.sum()
    assert kinds(faults) == ["reuse", "order"]
    torch.cuda.current_stream().synchronize()
    pinned.sum()
    assert kinds(faults) == ["reuse", "order", "wait"]


@pytest.mark.parametrize("sets", [True, False])
@pytest.mark.parametrize("blocking", [True, False])
def test_a_thread_that_waits_for_an_event(sets, blocking, faults):
    event = torch.cuda.Event(blocking=blocking)
    event.record()

    def wait():
        if sets:
            torch.cuda.set_device(DEVICE)
        event.synchronize()

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    assert kinds(faults) == ["device"] * (not sets) + ["spin"] * (not blocking)


def test_parameters_keep_what_they_are(faults):
    layer = torch.nn.Linear(3, 2)
    weight, layer.weight.mark = layer.weight, 5
    expected = layer(torch.ones(1, 3)).tolist()
    layer.to(DEVICE)
    assert layer.weight is weight
    assert weight.mark == 5
    assert weight.device == DEVICE
    out = layer(torch.ones(1, 3, device=DEVICE))
    out.sum().backward()
    assert weight.grad.device == DEVICE
    assert out.tolist() == expected
    weight.data = torch.zeros(2, 3, device=DEVICE)
    assert layer(torch.ones(1, 3, device=DEVICE)).tolist() == [layer.bias.tolist()]
