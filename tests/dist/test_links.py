"""What travels between stages: how many bytes, in which type, compressed how, and when."""

import jobs
import pytest
import torch
from ranks import run_ranks

LINKS = [
    {"codec": "bf16"},
    {"codec": "int8"},
    {"codec": "int4", "group_size": 8},
    {"codec": "topk", "keep": 0.25},
    {"codec": "lowrank", "rank": 8},
    {"codec": ["int8", "none", "lowrank"]},
]


@pytest.mark.parametrize("link", LINKS, ids=lambda link: str(link["codec"]))
def test_codecs_give_the_same_bits_on_1_2_and_4_ranks(link):
    section = {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}], "link": link}
    runs = [run_ranks(jobs.train, ranks, {**section, "segments_per_stage": 4 // ranks}, ranks, 3) for ranks in (1, 2, 4)]
    reference = runs[0]
    for other in runs[1:]:
        assert other[0]["reports"] == reference[0]["reports"]
        assert other[0]["eval"] == reference[0]["eval"]
        merged = {name: tensor for result in other for name, tensor in result["state"].items()}
        assert all(torch.equal(merged[name], tensor) for name, tensor in reference[0]["state"].items())
    plain = run_ranks(jobs.train, 1, {**section, "link": {}, "segments_per_stage": 4}, 1, 3)
    assert plain[0]["reports"] != reference[0]["reports"]  # the codec did something


def traffic(section, steps=2, **extra):
    """(bytes per step that segment 0 reports, types of what arrives at segment 1, size of a message)"""
    engine = jobs.build(section, 2, **extra)
    sent, seen = [], {}
    engine.reports.listeners.append(lambda rows: sent.append(rows[0].sent_bytes))
    if engine.stage_id == 1:
        link = engine.activation_links[0]
        receive = link.receive

        def looked_at(tag):
            found, message = receive(tag)
            seen.update({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in message.items()})
            return found, message

        link.receive = looked_at
    data = jobs.batches(engine)
    for _ in range(steps):
        engine.train_batch(data)
    engine.reports.flush()
    return {"sent": sent, "seen": seen, "message_bytes": engine.activation_links[0].message_bytes}


HEADER, LABELS, FIGURES = 32, 2 * 16 * 4, 2 * 6 * 8  # bytes; a micro-batch is 2 x 16 tokens of 32 features
HIDDEN = {
    "none": 2 * 16 * 32 * 4,
    "bf16": 2 * 16 * 32 * 2,
    "int8": 2 * 16 * (32 + 2),
    "int4": 2 * 16 * (16 + 2),
}


@pytest.mark.parametrize("codec", HIDDEN)
def test_metrics_count_the_bytes_on_the_wire(codec):
    first, second = run_ranks(traffic, 2, {"mode": "local", "link": {"codec": codec}})
    assert first["message_bytes"] == second["message_bytes"] == HEADER + HIDDEN[codec] + LABELS + FIGURES
    assert first["sent"] == [4 * first["message_bytes"]] * 2  # 4 micro-batches a step


def test_links_carry_bf16_when_training_in_bf16():
    _, second = run_ranks(traffic, 2, {"mode": "local"}, bf16={"enabled": True})
    assert second["seen"]["hidden"] == (torch.bfloat16, (2, 16, 32))
    assert second["message_bytes"] == HEADER + HIDDEN["bf16"] + LABELS + FIGURES
