"""Where the tensors of a message lie in its bytes, worked out by hand."""

import pytest
import torch
from sentences import assert_one_sentence

from ds_local.errors import TransportError
from ds_local.links.buffers import (
    HEADER,
    SPEC_BYTES,
    Buffer,
    Form,
    Packed,
    Spec,
    Tag,
    described,
    header_of,
    said_in,
    specs_of,
    text_buffer,
)

CPU = torch.device("cpu")
MESSAGE = {
    "hidden": torch.arange(6, dtype=torch.float32).view(2, 3),
    "mask": torch.tensor([True, False, True]),
    "labels": torch.tensor([7, -100]),
    "form=x": torch.empty(0, dtype=torch.uint8),
}


def test_tensors_begin_at_multiples_of_16_bytes():
    packed = Packed(specs_of(MESSAGE, CPU), reserved=HEADER * 8)
    # 24 bytes of floats, 3 of flags, 16 of labels, none
    assert packed.offsets == [32, 64, 80, 96]
    assert packed.num_bytes == 96


def test_what_is_written_into_the_bytes_is_read_from_them():
    packed = Packed(specs_of(MESSAGE, CPU), reserved=HEADER * 8)
    sent = Buffer(packed, torch.zeros(packed.num_bytes, dtype=torch.uint8))
    sent.header[:] = 1, 12, 3, 0
    for name, tensor in MESSAGE.items():
        sent.tensors[name].copy_(tensor)
    came = Buffer(packed, sent.data.clone())
    assert came.header.tolist() == [1, 12, 3, 0]
    assert came.tensors.keys() == MESSAGE.keys()
    for name, tensor in MESSAGE.items():
        assert torch.equal(came.tensors[name], tensor)
        assert came.tensors[name].dtype == tensor.dtype


def test_a_direct_link_sends_only_what_is_on_the_host_through_it():
    on_device = Spec("hidden", (2, 3), torch.bfloat16, on_host=False)
    on_host = Spec("labels", (2,), torch.int64, on_host=True)
    direct, staged = (Form([on_device, on_host], one) for one in (True, False))
    assert [spec.name for spec in direct.direct.specs] == ["hidden"]
    assert [spec.name for spec in direct.staged.specs] == ["labels"]
    assert (direct.staged.num_bytes, direct.num_bytes) == (32 + 16, 32 + 16 + 12)
    assert staged.direct.num_bytes == 0
    assert staged.num_bytes == 32 + 16 + 16


def test_a_message_may_be_shorter_than_its_buffer():
    packed = Packed(specs_of(MESSAGE, CPU), reserved=HEADER * 8)
    buffer = Buffer(packed, torch.zeros(1000, dtype=torch.uint8))
    buffer.tensors["labels"].fill_(3)
    assert len(buffer.data) == 96
    assert buffer.whole[80:96].view(torch.int64).tolist() == [3, 3]


def test_the_description_comes_back_as_it_was():
    specs = specs_of(MESSAGE, torch.device("meta"))
    assert all(spec.on_host for spec in specs)
    assert described(specs)[0] == ("hidden", [2, 3], "float32", True)
    buffer = text_buffer(3, {"layout": described(specs), "room": 20})
    assert header_of(buffer).tolist() == [3, len(buffer) - 32, 0, 0]
    longer = torch.cat([buffer, torch.full((50,), 255, dtype=torch.uint8)])
    said = said_in(longer)
    assert said["room"] == 20
    form = Form.parse(said["layout"], direct=False, number=5)
    assert (form.specs, form.number) == (specs, 5)


def test_a_description_that_is_too_long_is_refused():
    with pytest.raises(TransportError) as error:
        text_buffer(3, {"a": "x" * SPEC_BYTES})
    assert_one_sentence(error.value, str(SPEC_BYTES + 9), str(SPEC_BYTES), "send fewer tensors")


def test_a_tag_names_step_and_micro_batch():
    assert str(Tag(3, 1, run_ends=True)) == "step 3, micro-batch 1"
