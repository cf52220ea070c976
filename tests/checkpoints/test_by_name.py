"""The state of a checkpoint by name, from files in memory; all numbers are written down."""

from types import SimpleNamespace

import pytest
import torch

from ds_local.checkpoints.by_name import (
    MASTERS,
    NAMES,
    WEIGHTS,
    SavedState,
    checksum,
    trained_by_part,
)
from ds_local.config.schema import LocalParallelConfig
from ds_local.errors import CheckpointError, MoveError

SECTION = LocalParallelConfig().model_dump(mode="json")
TRAINED = trained_by_part(["0.w", "1.w", "1.b", "heads.after 1.r", "2.w", "3.w"])


def facts(files, stages=2, replicas=1):
    return {
        "segment_parts": [0, 1, 2, 3, 4],
        "num_stages": stages,
        "num_replicas": replicas,
        "segment_stages": None,
        "files": files,
        "local_parallel": SECTION,
    }


def row(*numbers):
    return torch.tensor([float(n) for n in numbers])


def layers():
    return {
        "layer_00-model_states.pt": {"w": row(1, 2)},
        "layer_01-model_states.pt": {"w": row(3, 4).view(2, 1), "b": row(5), "frozen": row(6)},
        "layer_02-model_states.pt": {"w": row(7)},
        "layer_03-model_states.pt": {"w": row(8)},
        "head_00-model_states.pt": {"r": row(9)},
    }


def by_parameter(names=None, numbers=(0, 1, 2, 3)):
    """Stage 0 of a checkpoint in fp32 without ZeRO."""
    state = {
        0: {"exp_avg": row(10, 20), "step": torch.tensor(5.0)},
        1: {"exp_avg": row(30, 40).view(2, 1), "step": torch.tensor(5.0)},
        2: {"exp_avg": row(50), "step": torch.tensor(4.0)},
    }
    group = {"lr": 0.5, "params": list(numbers)}
    content = {"optimizer": {"state": state, "param_groups": [group]}}
    return content if names is None else {**content, NAMES: names}


def saved(files, layers=range(2), **shape):
    return SavedState(files.__getitem__, facts(files, **shape), TRAINED, layers)


def numbers(state, name, key, start=0, count=None):
    size = state.size(name, key) if count is None else count
    return state.read(name, key, start, size).tolist()


@pytest.mark.parametrize(
    "names", [[["0.w", "1.w", "1.b", "heads.0.r"]], None], ids=["named", "an older one"]
)
def test_state_by_parameter(names):
    files = layers() | {"mp_rank_00_model_states.pt": by_parameter(names)}
    state = saved(files)
    assert numbers(state, "1.w", WEIGHTS) == [3, 4]
    assert numbers(state, "1.w", "exp_avg") == [30, 40]
    assert numbers(state, "1.frozen", WEIGHTS) == [6]
    assert state.moments("1.b") == ["exp_avg"]
    assert state.counters["1.b"] == {"step": 4.0}
    assert state.settings["1.b"]["lr"] == 0.5
    assert numbers(state, "heads.after 1.r", WEIGHTS) == [9]
    assert state.moments("heads.after 1.r") == []  # it has not been trained yet
    assert "heads.after 1.r" in state.settings
    assert "2.w" not in state  # of the other stage, whose files were not asked for


def test_an_older_one_that_goes_by_other_numbers_is_refused():
    files = layers() | {"mp_rank_00_model_states.pt": by_parameter(numbers=(0, 1, 2))}
    with pytest.raises(MoveError, match="is of an earlier version and does not name"):
        saved(files)
    files = layers() | {"mp_rank_00_model_states.pt": by_parameter(numbers=(1, 0, 2, 3))}
    files["layer_00-model_states.pt"] = {"w": row(1, 2, 3)}  # not as large as what is said of it
    with pytest.raises(MoveError, match="is of an earlier version and does not name"):
        saved(files)


def shard(masters, moments, places):
    places = {name: SimpleNamespace(start=a, numel=n) for name, (a, n) in places.items()}
    base = {
        "state": {0: {"exp_avg": row(*moments), "step": torch.tensor(3.0)}},
        "param_groups": [{"lr": 0.25, "params": [0]}],
    }
    return {
        "optimizer_state_dict": {
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": [row(*masters)],
            "param_slice_mappings": [places],
        }
    }


def in_shards(prefix):
    """Stage 1 on two replicas: 2.w [5 elements] is cut after its third."""
    files = layers()
    files["layer_02-model_states.pt"] = {"w": torch.zeros(5, dtype=torch.bfloat16)}
    name = prefix + "zero_pp_rank_{}_mp_rank_01_optim_states.pt"
    files[name.format(0)] = shard([1, 2, 3], [10, 20, 30], {"2.w": (0, 3)})
    places = {"2.w": (0, 2), "3.w": (2, 1)}
    files[name.format(1)] = shard([4, 5, 6, 0], [40, 50, 60, 0], places)
    return files


@pytest.mark.parametrize("prefix", ["bf16_", ""])
def test_state_that_is_cut_out_of_flat_groups(prefix):
    state = saved(in_shards(prefix), range(2, 4), replicas=2)
    assert numbers(state, "2.w", MASTERS) == [1, 2, 3, 4, 5]
    assert numbers(state, "2.w", "exp_avg", 1, 3) == [20, 30, 40]
    assert numbers(state, "2.w", "exp_avg", 3, 2) == [40, 50]
    assert numbers(state, "3.w", MASTERS) == [6]  # and not the padding
    assert state.counters["3.w"] == {"step": 3.0}
    with pytest.raises(CheckpointError, match=r"has 1 of the 2 elements from 4 on of 2.w \(exp"):
        state.read("2.w", "exp_avg", 4, 2)


@pytest.mark.parametrize("damage", [{}, {"optimizer_state_dict": {}}, {"optimizer_state_dict": 3}])
def test_files_of_something_else(damage):
    files = in_shards("")
    files["zero_pp_rank_1_mp_rank_01_optim_states.pt"] = damage
    with pytest.raises(CheckpointError, match=r"zero_pp_rank_1_mp_rank_01.* is not what ds_local"):
        saved(files, range(2, 4), replicas=2)


def test_checksums_add_up_however_a_tensor_is_cut():
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    whole = checksum(values)
    for cut in (1, 7, 1000, 2999):
        parts = checksum(values[:cut]), checksum(values[cut:], cut)
        assert sum(parts) % 2**64 == whole
    assert checksum(values.bfloat16()) != whole


def test_checksums_see_bits_and_places():
    values = torch.zeros(600_000)  # more than is summed at a time
    values[400_000] = 1.0
    whole = checksum(values)
    moved, flipped = torch.zeros_like(values), values.clone()
    moved[400_001] = 1.0
    flipped[5] = torch.tensor(1, dtype=torch.int32).view(torch.float32)  # the least there is
    swapped = values.roll(1)
    assert len({whole, checksum(moved), checksum(flipped), checksum(torch.zeros(3))}) == 4
    assert checksum(swapped) == checksum(moved)
    ids = torch.arange(5), torch.tensor([True, False])
    assert all(checksum(one) != checksum(torch.zeros_like(one)) for one in ids)
