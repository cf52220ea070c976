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
    difference,
    spec_buffer,
    specs_of,
    text_of,
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
    assert Packed([], least=50).num_bytes == 50


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
    assert direct.staged.num_bytes == 1024  # room for why a run failed
    assert direct.num_bytes == 1024 + 12
    assert staged.direct.num_bytes == 0
    assert staged.num_bytes == 32 + 16 + 16


def test_the_description_comes_back_as_it_was():
    specs = specs_of(MESSAGE, torch.device("meta"))
    assert all(spec.on_host for spec in specs)
    assert described(specs)[0] == ("hidden", [2, 3], "float32", True)
    assert Form.parse(described(specs), direct=False).specs == specs
    text = text_of(spec_buffer({"a": described(specs)}))
    assert text.startswith('{"a": [["hidden", [2, 3], "float32", true]')


def test_a_description_that_is_too_long_is_refused():
    with pytest.raises(TransportError) as error:
        spec_buffer({"a": "x" * SPEC_BYTES})
    assert_one_sentence(error.value, str(SPEC_BYTES + 9), str(SPEC_BYTES), "send fewer tensors")


def test_a_difference_is_said_in_words():
    old = specs_of({"x": torch.zeros(2, 3), "y": torch.zeros(1)}, CPU)
    new = specs_of({"x": torch.zeros(2, 4), "y": torch.zeros(1)}, CPU)
    assert difference(old, new) == ("x float32 [2, 3]", "x float32 [2, 4]")
    assert difference(old, new[:1]) == ("x float32 [2, 3], y float32 [1]", "x float32 [2, 4]")
    assert difference(old, [*old, *new[:1]]) == ("less", "x float32 [2, 4]")


def test_a_tag_names_step_and_micro_batch():
    assert str(Tag(3, 1, last_step=True)) == "step 3, micro-batch 1"
