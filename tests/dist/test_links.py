"""What travels between stages: how many bytes, in which type, compressed how, and when."""

from types import SimpleNamespace

import jobs
import pytest
import torch
from ranks import run_ranks
from samples import sampled

from ds_local.errors import ConfigError
from ds_local.links.staging import Direct

LINKS = [
    {"codec": "bf16"},
    {"codec": "int8"},
    {"codec": "int4", "group_size": 8},
    {"codec": "topk", "keep": 0.25},
    {"codec": "lowrank", "rank": 8},
    {"codec": ["int8", "none", "lowrank"]},
]


@pytest.mark.parametrize(  # the last has whole numbers, low rank and none
    "link", sampled([LINKS[2], LINKS[3], LINKS[5]], LINKS), ids=lambda link: str(link["codec"])
)
def test_codecs_give_the_same_bits_on_1_2_and_4_ranks(link):
    section = {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}], "link": link}
    runs = [
        run_ranks(jobs.train, ranks, {**section, "segments_per_stage": 4 // ranks}, ranks, 3)
        for ranks in (1, 2, 4)
    ]
    reference = runs[0]
    for other in runs[1:]:
        assert other[0]["reports"] == reference[0]["reports"]
        assert other[0]["eval"] == reference[0]["eval"]
        merged = {name: tensor for result in other for name, tensor in result["state"].items()}
        assert all(
            torch.equal(merged[name], tensor) for name, tensor in reference[0]["state"].items()
        )
    plain = run_ranks(jobs.train, 1, {**section, "link": {}, "segments_per_stage": 4}, 1, 3)
    assert plain[0]["reports"] != reference[0]["reports"]  # the codec did something


@pytest.mark.parametrize(
    "row",
    [
        {"mode": "overlapping"},
        {"mode": "local", "head": {"blocks": 1, "blocks_from": "next_tracked"}},
    ],
)
def test_past_the_host_gives_the_same_bits(row):
    through, past = (
        run_ranks(jobs.train, 2, {**row, "link": {"past_host": past}}, 2, 3)
        for past in (False, True)
    )
    for one, other in zip(through, past, strict=True):
        assert one["reports"] == other["reports"]
        assert one["eval"] == other["eval"]
        assert all(
            torch.equal(other["state"][name], tensor) for name, tensor in one["state"].items()
        )


def past(section):
    """Of each link of this rank, does anything on it go past the host?"""
    engine = jobs.build(section, 2)
    ends = {name: end for name, end in engine.connections.ends.items() if end is not None}
    return {name: end._direct is not None for name, end in ends.items()}


def test_copies_for_heads_go_through_the_host():
    """They are taken steps after they were sent."""
    section = {"mode": "overlapping", "head": {"readout": "shared"}, "link": {"past_host": True}}
    for found in run_ranks(past, 2, section):
        assert found.pop("readout copy 1 -> 0") is False
        assert len(found) == 2  # activations and gradients
        assert all(found.values())


def failing(past_host):
    """What stage 1 hears when stage 0 fails after a message."""
    import torch.distributed as dist

    from ds_local.engine.process_group import start_processes
    from ds_local.errors import TransportError
    from ds_local.links.buffers import Tag
    from ds_local.links.groups import Groups
    from ds_local.links.transport import make_end

    start_processes()
    host, groups = torch.device("cpu"), Groups()
    end = make_end("link", dist.get_rank(), 0, 1, [[0, 1]], 2, 60.0, host, groups, past_host)
    tensors = {"hidden": torch.arange(6.0).view(2, 3), "ids": torch.tensor([1, 2])}
    if dist.get_rank() == 0:
        end.send(Tag(0, 0), tensors)
        end.fail("stage 0 ran out of paper")
        return None
    _, message = end.receive(Tag(0, 0))
    assert all(torch.equal(message[name], tensor) for name, tensor in tensors.items())
    try:
        end.receive(Tag(0, 1))
    except TransportError as error:
        return str(error), end.num_bytes == end.message_bytes


@pytest.mark.parametrize("past_host", [False, True])
def test_the_reason_of_a_failure_fits_into_a_message(past_host):
    _, (said, counted) = run_ranks(failing, 2, past_host)
    assert counted
    assert said.startswith(
        "the run ended elsewhere: stage 0 ran out"
        if past_host
        else "the run ended elsewhere: stage 0"
    )


def crossing(past_host):
    """Both ranks send before they receive, over links that hold one message. As with NCCL, the
    first transfer of a group takes both ends."""
    import torch.distributed as dist

    from ds_local.engine.process_group import start_processes
    from ds_local.links.groups import Groups
    from ds_local.links.transport import make_end

    start_processes()
    rank, groups, host = dist.get_rank(), Groups(), torch.device("cpu")
    connected, isend = set(), dist.isend

    def sends(tensor, peer, group):
        work = isend(tensor, peer, group)
        if group in connected:
            return work
        connected.add(group)
        work.wait()  # once: gloo waits for ever the second time
        return SimpleNamespace(wait=lambda *limit: True)

    dist.isend = sends
    try:
        up, down = (
            make_end(f"link from {a}", rank, a, 1 - a, [[0, 1]], 1, 10.0, host, groups, past_host)
            for a in (0, 1)
        )
        return list(crossed(rank, up, down))
    finally:
        dist.isend = isend


def crossed(rank, up, down):
    import torch.distributed as dist

    from ds_local.links.buffers import Tag

    mine, other = (up, down) if rank == 0 else (down, up)
    for step in range(3):
        mine.send(Tag(step, 0), {"x": torch.full((2,), float(rank + step))})
        dist.barrier()
        yield other.receive(Tag(step, 0))[1]["x"].tolist()
    mine.flush()  # what goes past the host leaves once it is asked for


@pytest.mark.parametrize("past_host", [False, True])
def test_a_link_of_depth_one_holds_a_message_from_the_start(past_host):
    first, second = run_ranks(crossing, 2, past_host, timeout=60)
    assert first == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    assert second == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


def test_ranks_that_share_a_gpu_cannot_go_past_the_host(monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", "4")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="4 ranks share 2 on this machine; set it to false"):
        Direct.backend(torch.device("cuda"))
    assert Direct.backend(torch.device("cpu")) == "gloo"


def traffic(section, steps=2, **extra):
    """(bytes per step that segment 0 reports, types of what arrives at segment 1, size of a
    message)"""
    engine = jobs.build(section, 2, **extra)
    sent, seen = [], {}
    engine.reports.listeners.append(lambda rows: sent.append(rows[0].sent_bytes))
    if engine.stage_id == 1:
        link = engine.activation_links[0]
        receive = link.receive

        def looked_at(tag):
            found, message = receive(tag)
            seen.update(
                {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in message.items()}
            )
            return found, message

        link.receive = looked_at
    data = jobs.batches(engine)
    for _ in range(steps):
        engine.train_batch(data)
    engine.reports.flush()
    return {"sent": sent, "seen": seen, "message_bytes": engine.activation_links[0].message_bytes}


HEADER, LABELS, FIGURES = (
    32,
    2 * 16 * 4,
    2 * 15 * 8,
)  # bytes; a micro-batch is 2 x 16 tokens of 32 features
HIDDEN = {
    "none": 2 * 16 * 32 * 4,
    "bf16": 2 * 16 * 32 * 2,
    "int8": 2 * 16 * (32 + 2),
    "int4": 2 * 16 * (16 + 2),
}


@pytest.mark.parametrize("codec", HIDDEN)
def test_metrics_count_the_bytes_on_the_wire(codec):
    first, second = run_ranks(traffic, 2, {"mode": "local", "link": {"codec": codec}})
    assert (
        first["message_bytes"]
        == second["message_bytes"]
        == HEADER + HIDDEN[codec] + LABELS + FIGURES
    )
    assert first["sent"] == [4 * first["message_bytes"]] * 2  # 4 micro-batches a step


def test_links_carry_bf16_when_training_in_bf16():
    _, second = run_ranks(traffic, 2, {"mode": "local"}, bf16={"enabled": True})
    assert second["seen"]["hidden"] == (torch.bfloat16, (2, 16, 32))
    assert second["message_bytes"] == HEADER + HIDDEN["bf16"] + LABELS + FIGURES


# --- when things travel ---------------------------------------------------------------------------


def on_time(which, stages=2):
    """Two stages; each waits, where it computes, for what must have happened at the other by
    then."""
    import pathlib
    import time

    from torch import nn

    import ds_local

    folder = pathlib.Path(which[1])

    def wait_for(condition, what):
        deadline = time.monotonic() + 60
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} did not happen")
            time.sleep(0.005)

    def arrived():
        """Has the message of the step's second micro-batch landed here?"""
        posted = engine.activation_links[0]._under_way[0][1]
        return posted[16:24].view(torch.int64).item() == 1

    class Layer(nn.Module):
        def __init__(self, stage):
            super().__init__()
            self.stage, self.calls = stage, 0
            self.linear = nn.Linear(8, 8)

        def forward(self, hidden):
            self.calls += 1
            if self.stage == 1:
                (folder / f"arrived-{self.calls}").touch()
                if which[0] == "receives" and self.calls == 1:
                    engine.activation_links[0]._under_way[0][
                        1
                    ].zero_()  # its header says nothing yet
                    (folder / "looked").touch()
                    wait_for(arrived, "a receive while the stage computes")
            elif which[0] == "receives" and self.calls == 2:
                wait_for((folder / "looked").exists, "the look at the buffer")
            return self.linear(hidden)

    class Head(nn.Module):
        calls = 0

        def forward(self, hidden, labels):
            self.calls += 1
            if which[0] == "sends":
                wait_for(
                    (folder / f"arrived-{self.calls}").exists, "an arrival before the head has run"
                )
            return hidden.square().mean()

    config = jobs.ds_config({"mode": "local"}, gas=2)
    module = ds_local.LocalPipelineModule(
        [Layer(0), Layer(1)],
        stages,
        loss_fn=lambda h, y: h.square().mean(),
        head=lambda s: Head(),
        config=config,
    )
    engine = ds_local.initialize(model=module, config=config)[0]
    data = iter([(torch.ones(2, 8), torch.zeros(2))] * 2)
    engine.train_batch(data)
    return True


@pytest.mark.parametrize("which", ["sends", "receives"])
def test_activations_leave_before_the_head_and_land_while_the_next_stage_computes(which, tmp_path):
    assert run_ranks(on_time, 2, (which, str(tmp_path))) == [True, True]


def staged(fail=False):
    """Messages whose copies off the device take a while, as on a GPU: they leave later, in order,
    and whole."""
    import threading

    import torch.distributed as dist

    from ds_local.engine.process_group import start_processes
    from ds_local.links.buffers import Tag
    from ds_local.links.ends import Peer
    from ds_local.links.groups import Groups
    from ds_local.links.pair import Receiver, Sender
    from ds_local.links.staging import Staging

    start_processes()
    group, depth, count = Groups().of([0, 1]), 2, 7
    dist.barrier()  # nobody leaves while the other still connects
    may_copy = threading.Event()

    class Slow(Staging):
        """Copies when it is waited for, on the thread that waits."""

        def to_host(self, views, tensors):
            class Event:
                def synchronize(self):
                    if fail:
                        raise RuntimeError("the copy failed")
                    may_copy.wait(60)
                    for name, view in views.items():
                        view.copy_(tensors[name])

            return Event()

    if dist.get_rank() == 0:
        sender = Sender("link", group, Peer(1, 1), depth, 60.0, Slow(torch.device("cpu")))
        for i in range(depth):
            sender.send(Tag(0, i), {"hidden": torch.full((3, 5), float(i))})
        may_copy.set()  # send has returned before any copy was done
        try:
            for i in range(depth, count):
                sender.send(Tag(0, i), {"hidden": torch.full((3, 5), float(i))})
            sender.flush()
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
        return len({id(buffer) for buffer in sender._free})
    if fail:
        return None
    receiver = Receiver("link", group, Peer(0, 0), depth, 60.0, Staging(torch.device("cpu")))
    return [receiver.receive(Tag(0, i))[1]["hidden"].unique().tolist() for i in range(count)]


def test_sends_wait_for_their_copies_beside_the_computation():
    buffers, received = run_ranks(staged, 2)
    assert received == [[float(i)] for i in range(7)]
    assert buffers <= 3  # the ring is reused: as many as can be under way, and one being filled


def test_a_copy_that_fails_is_told_as_what_it_is():
    said, _ = run_ranks(staged, 2, fail=True)
    assert said == "RuntimeError: the copy failed"  # no connection is to blame


def calls_of_a_step(gas):
    """Python calls of one optimizer step."""
    import cProfile
    import pstats

    engine = jobs.build({"mode": "local"}, 2, gas=gas)
    data = jobs.batches(engine)
    for _ in range(2):
        engine.train_batch(data)
    profile = cProfile.Profile()
    profile.runcall(engine.train_batch, data)
    return pstats.Stats(profile).total_calls


def test_host_work_of_a_micro_batch_does_not_grow_with_their_number():
    few, more, many = (run_ranks(calls_of_a_step, 2, gas) for gas in (4, 12, 20))
    for stage in range(2):
        assert many[stage] - more[stage] == pytest.approx(more[stage] - few[stage], rel=0.02)
