"""Groups of some ranks: made by them alone, one for all that two of them say to each other."""

import pytest
import torch
from ranks import run_ranks

from ds_local.config.files import local_parallel
from ds_local.links.groups import in_turn
from ds_local.schedules.run_plan import RunPlan


def exchange():
    from torch import distributed as dist

    from ds_local.links.groups import Groups

    # as DeepSpeed binds it where ranks have GPUs
    bound = dist.group.WORLD.bound_device_id = torch.device("cpu:0")
    world = dist.distributed_c10d._world
    known, groups, rank, got, sent = len(world.pg_map), Groups(), dist.get_rank(), [], []
    for lower, upper in in_turn([(0, 1), (1, 2), (2, 3)]):
        if rank in (lower, upper):
            groups.pair(lower + upper - rank)
    for tag in (7, 3) if rank < 3 else ():  # the later one first
        number = torch.tensor([float(rank + tag)])
        sent.append(groups.pair(rank + 1).send(number, rank + 1, tag))
    for tag in (3, 7) if rank else ():
        number = torch.zeros(1)
        groups.pair(rank - 1).receive(number, rank - 1, tag).wait()
        got.append(number.item())
    for work in sent:
        work.wait()
    grown = len(world.pg_map) - known
    return got, len(groups), dist.group.WORLD.bound_device_id == bound, grown


def test_pairs_talk_by_tags_and_torch_knows_nothing_of_them():
    assert run_ranks(exchange, 4) == [
        ([], 1, True, 0),
        ([3.0, 7.0], 2, True, 0),
        ([4.0, 8.0], 2, True, 0),
        ([5.0, 9.0], 1, True, 0),
    ]


def test_neighbours_meet_in_two_turns():
    chain = [(n, n + 1) for n in range(5)]
    assert in_turn(chain) == [(0, 1), (2, 3), (4, 5), (1, 2), (3, 4)]
    assert in_turn([(0, 1), (1, 1), (1, 0)]) == [(0, 1)]


def kept():
    import gc

    from torch import distributed as dist

    from ds_local.links.groups import Groups

    known = len(Groups._made)
    Groups().of(range(2))
    first = len(Groups._made), [len(groups) for groups in Groups._made[dist.group.WORLD]]
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()
    return known, first, len(Groups._made)


def test_groups_end_with_the_world_and_not_with_their_owner():
    assert run_ranks(kept, 2) == [(0, (1, [1]), 0)] * 2


# --- how many -----------------------------------------------------------------------------------


class Counted:
    """Stands for a group that would connect with other ranks."""

    def __init__(self, name, ranks):
        self.places = {rank: place for place, rank in enumerate(ranks)}

    def take_tags(self, number=1):
        return 0

    def send(self, *_):
        raise AssertionError("nothing is sent before a step")

    def receive(self, *_):
        """A mailbox has receives posted."""


def nothing_yet(groups):
    groups._name, groups._groups = "", {}


def groups_of_a_rank(rank, stages, replicas, section, monkeypatch):
    """What one rank of a large run makes: (its groups, calls of torch's `new_group`)."""
    from torch import distributed as dist

    from ds_local.engine.connections import Connections
    from ds_local.engine.reports import Reports
    from ds_local.links import groups as module
    from ds_local.schedules.schedule import Link

    calls = []
    monkeypatch.setattr(module, "HostGroup", Counted)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: rank)
    monkeypatch.setattr(dist, "new_group", lambda *args, **how: calls.append(args))
    monkeypatch.setattr(module.Groups, "__init__", nothing_yet)
    parsed = local_parallel({"local_parallel": section})
    ranks = parsed.layout.ranks(stages, replicas)
    plan, (stage, replica) = RunPlan(parsed, stages, 2), divmod(rank, replicas)
    stage_of, host = range(stages), torch.device("cpu")
    made = Connections(stage_of, stage, replica, ranks, host, parsed.link)
    for link in (*(Link("activation", n) for n in range(stages - 1)), *plan.gradient_links):
        made.make_link(link)
    Reports(stage_of, 1, ranks[0][-1], [stage], list(made.ends), made.groups)
    return len(made.groups), len(calls), len(made.own)


@pytest.mark.parametrize("mode", ["backprop", "overlapping"])
def test_groups_grow_with_neighbours_and_not_with_ranks(mode, monkeypatch):
    for stages, replicas in ((16, 1), (256, 1), (16, 16)):
        for stage in (0, 1, stages // 2, stages - 1):
            made, calls, ends = groups_of_a_rank(
                stage * replicas, stages, replicas, {"mode": mode}, monkeypatch
            )
            neighbours = 2 - (stage in (0, stages - 1))
            mailbox = stage in (0, stages - 1)  # from the last stage to the first
            assert made == neighbours + mailbox
            assert calls == 0
            assert ends == 2 * neighbours  # activations and gradients share a group
