"""Groups of some ranks, beside a world that is bound to a device."""

from ranks import run_ranks


def exchange():
    import torch
    from torch import distributed as dist

    from ds_local.links.groups import host_group

    # as DeepSpeed binds it where ranks have GPUs
    bound = dist.group.WORLD.bound_device_id = torch.device("cpu:0")
    groups = [host_group(pair) for pair in ([0, 1], [1, 2], [2, 3])]
    rank, got = dist.get_rank(), []
    for lower, group in enumerate(groups):
        number = torch.tensor([float(rank)])
        if rank == lower:
            dist.send(number, rank + 1, group)
        elif rank == lower + 1:
            dist.recv(number, lower, group)
            got.append(number.item())
    return got, dist.group.WORLD.bound_device_id == bound


def test_pairs_talk_and_the_world_stays_bound():
    assert run_ranks(exchange, 4) == [([], True), ([0.0], True), ([1.0], True), ([2.0], True)]
