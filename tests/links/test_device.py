"""Between a device and the host, on a pretended device."""

import torch
from standin import standin

from ds_local.links.device import to_device, to_host

DEVICE = torch.device("cuda", 1)


def test_tensors_come_to_the_host_with_one_wait():
    tensors = [torch.randn(3, 4).bfloat16(), torch.randn(2), torch.tensor(5.0)]
    expected = torch.cat([tensor.flatten().float() for tensor in tensors])
    with standin(1) as faults:
        moved = [to_device(tensor, DEVICE) for tensor in tensors[:2]]
        flat = to_host([*moved, tensors[2]])
        assert torch.equal(flat, expected)
    assert [fault.kind for fault in faults] == ["wait"]
    assert torch.equal(to_host(tensors), expected)


def test_what_lies_on_the_device_is_not_copied():
    with standin(1):
        tensor = to_device(torch.ones(3), DEVICE)
        assert to_device(tensor, DEVICE) is tensor
    plain = torch.ones(3)
    assert to_device(plain, torch.device("cpu")) is plain
