"""The link between two segments of one stage."""

import pytest
import torch

from ds_local.errors import TransportError
from ds_local.links.buffers import Tag
from ds_local.links.transport import MemoryLink


def test_within_a_stage_nobody_sees_what_another_does_in_place():
    link, sent = MemoryLink(), torch.ones(2, 3).t()
    link.send(Tag(0, 0), {"x": sent})
    got = link.receive(Tag(0, 0))[1]["x"]
    sent.zero_()
    assert got.is_contiguous()
    assert got.sum() == 6
    with pytest.raises(TransportError, match="no message for step 0, micro-batch 0"):
        link.receive(Tag(0, 0))


def test_messages_of_a_stage_come_in_any_order_with_their_tags():
    link = MemoryLink()
    for micro_batch in (0, 1):
        link.send(Tag(4, micro_batch, run_ends=True), {"x": torch.tensor(micro_batch)})
    for micro_batch in (1, 0):
        tag, message = link.receive(Tag(4, micro_batch))
        assert (tag, message["x"].item()) == (Tag(4, micro_batch, run_ends=True), micro_batch)
