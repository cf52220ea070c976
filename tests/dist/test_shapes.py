"""Shapes that change from message to message: lengths that grow, a last batch, evaluation batches
of another size."""

import jobs
import pytest
import torch
from ranks import run_ranks
from reference import Reference, batch, table_of
from samples import sampled

# of the micro-batches of successive steps: (sequences, tokens)
SIZES = [
    [(2, 4), (2, 4)],
    [(2, 4), (2, 6)],
    [(3, 16), (1, 6)],
    [(2, 4), (2, 12)],
    [(1, 16), (4, 16)],
]
EVALUATED = [(5, 10), (1, 4), (5, 10)]


# --- a link ---------------------------------------------------------------------------------------

LENGTHS = [3, 3, 10, 0, 9000, 5, 9001, 20000, 3, 40000, 9000]


def message_of(number):
    generator = torch.Generator().manual_seed(number)
    tensors = {
        "hidden": torch.randn(2, LENGTHS[number], generator=generator),
        "ids": torch.arange(LENGTHS[number]),
    }
    return tensors | ({"mask": torch.tensor([True])} if number % 3 == 0 else {})


def one_after_another(depth, past_host):
    import torch.distributed as dist

    from ds_local.engine.process_group import start_processes
    from ds_local.links.buffers import Tag
    from ds_local.links.groups import Groups
    from ds_local.links.transport import make_end

    start_processes()
    rank = dist.get_rank()
    host, groups = torch.device("cpu"), Groups()
    end = make_end("link", rank, 0, 1, [[0, 1]], depth, 60.0, host, groups, past_host)
    order = [*range(len(LENGTHS)), *reversed(range(len(LENGTHS)))]
    for place, number in enumerate(order):
        tag, expected = Tag(place, 0), message_of(number)
        if rank == 0:
            end.send(tag, expected)
            continue
        found = end.receive(tag)[1]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    if rank == 0:
        end.flush()
        assert len(end._free) <= depth + 1
        assert {len(buffer.whole) for buffer in end._free} == {end._room}
        end.release()
        end.send(Tag(len(order), 0), message_of(1))
        end.fail("stage 0 ran out of paper")
        return end._tag, end.num_bytes
    end.receive(Tag(len(order), 0))
    assert len(end._under_way) == depth  # the old rings are gone
    with pytest.raises(Exception, match="ran out of paper"):
        end.receive(Tag(99, 0))
    return end._tag, end.num_bytes


@pytest.mark.parametrize("past_host", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_messages_of_a_link_change_their_shapes(depth, past_host):
    first, second = run_ranks(one_after_another, 2, depth, past_host)
    assert first == second
    # a column takes 16 bytes: one ring for the first message, others for 9000, 9001 (half as large
    # again, 216 kB), 20000 and 40000 columns
    assert first[0] == (1 if past_host else 5)


# --- a pipeline -----------------------------------------------------------------------------------


def batches_of(sizes, start=0):
    return [batch(start, n, 0, size, length) for n, (size, length) in enumerate(sizes)]


def train(section, stages, **settings):
    engine = jobs.build(section, stages, gas=2, **settings)
    reports = []
    engine.reports.listeners.append(lambda rows: reports.append({r.segment: r.loss for r in rows}))
    for step, sizes in enumerate(SIZES):
        engine.train_batch(iter(batches_of(sizes, step)))
        if step % 2:
            count = len(EVALUATED)
            engine.eval_batch(iter(batches_of(EVALUATED, 99)), num_micro_batches=count)
            reports.append(dict(engine.eval_losses))
            engine.reset_activation_shape()
    return {"reports": reports, "state": jobs.state_of(engine)}


ROWS = {
    "local": {"mode": "local"},
    "mixed": {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "overlapping"}]},
    "split": {"mode": "backprop", "split_backward": 1},
    "run ahead": {"mode": "backprop", "run_ahead": "auto"},
    "coded": {"mode": "chunked", "link": {"codec": "int8", "depth": 1}, "loss_weighting": "token"},
}


@pytest.mark.parametrize("row", sampled(["mixed", "run ahead", "coded"], [*ROWS]))
def test_the_same_bits_on_1_2_and_4_ranks(row):
    runs = [
        run_ranks(train, ranks, ROWS[row] | {"segments_per_stage": 4 // ranks}, ranks)
        for ranks in (1, 2, 4)
    ]
    whole = runs[0][0]
    for other in runs[1:]:
        assert other[0]["reports"] == whole["reports"]
        merged = {name: tensor for result in other for name, tensor in result["state"].items()}
        assert merged.keys() == whole["state"].keys()
        assert all(torch.equal(merged[name], tensor) for name, tensor in whole["state"].items())


def test_weights_are_those_of_one_process():
    state = {}
    for result in run_ranks(train, 2, {"mode": "overlapping"}, 2):
        state |= result["state"]
    parts = run_ranks(parts_of, 2, {"mode": "overlapping"}, 2)[0]
    reference = Reference("gpt2", parts)
    for step, sizes in enumerate(SIZES):
        reference.step(batches_of(sizes, step), [table_of("overlapping", 2)] * 2)
    expected = reference.state()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def parts_of(section, stages):
    return jobs.build(section, stages, gas=2).module.segment_parts
