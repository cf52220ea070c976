"""The instructions of neighbouring stages go with each other."""

from itertools import pairwise

import pytest
from deepspeed.runtime.pipe.schedule import PipeInstruction
from schedule_rows import schedule_of

from ds_local.engine.executor import Executor
from ds_local.engine.instructions import (
    METHODS,
    ForwardPass,
    GradientPass,
    LoadMicroBatch,
    RecvActivation,
    RecvGrad,
    SendActivation,
    SendGrad,
    StageSchedule,
    WeightGradient,
)
from ds_local.schedules.routes import MODES


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_every_send_has_its_receive_in_the_neighbour(mode, stages, micro_batches):
    whole = schedule_of((mode, None, micro_batches), stages=stages)
    parts = [StageSchedule(whole, stage) for stage in range(stages)]
    steps = [list(part.steps()) for part in parts]
    assert all(isinstance(cmd, PipeInstruction) for part in steps for step in part for cmd in step)

    def found(stage, kind):
        return [cmd for step in steps[stage] for cmd in step if isinstance(cmd, kind)]

    for lower, upper in pairwise(range(stages)):
        sent = [cmd.micro_batch for cmd in found(lower, SendActivation)]
        assert (
            sent
            == [cmd.micro_batch for cmd in found(upper, RecvActivation)]
            == list(range(micro_batches))
        )
        down = [(cmd.micro_batch, cmd.loss) for cmd in found(upper, SendGrad)]
        assert sorted(down) == sorted((cmd.micro_batch, cmd.loss) for cmd in found(lower, RecvGrad))
        assert bool(down) == {"local": False, "backprop": True}.get(mode, bool(down))
    assert not found(0, RecvActivation)
    assert len(found(0, LoadMicroBatch)) == micro_batches
    assert not any(found(stage, LoadMicroBatch) for stage in range(1, stages))
    assert not found(stages - 1, SendActivation)
    assert not found(stages - 1, RecvGrad)
    for stage, part in enumerate(parts):
        assert len(found(stage, ForwardPass)) == micro_batches
        assert 1 <= part.num_pipe_buffers() <= max(1, min(stages - stage, micro_batches))
        assert [type(cmd).__name__ for cmd in steps[stage][-1]] == ["ReduceGrads", "OptimizerStep"]


def test_a_stage_of_two_by_hand():
    schedule = schedule_of(("backprop", None, 1), stages=2)

    def names(stage, **how):
        return [
            [type(one).__name__ for one in step] for step in StageSchedule(schedule, stage, **how)
        ]

    end = ["ReduceGrads", "OptimizerStep"]
    assert names(0) == [
        ["LoadMicroBatch", "ForwardPass", "SendActivation"],
        ["RecvGrad", "GradientPass"],
        end,
    ]
    assert names(1) == [
        ["RecvActivation", "ForwardPass"],
        ["GradientPass", "SendGrad"],
        end,
    ]
    assert names(0, with_step=False) == names(0)[:-1]


def test_a_split_pass_computes_its_weight_gradient_later():
    schedule = schedule_of(("backprop", None, 1), stages=2, split=1)
    steps = list(StageSchedule(schedule, 1).steps())
    gradient, weights = steps[1][0], steps[2][0]
    assert (type(gradient), gradient.split) == (GradientPass, True)
    assert (type(weights), weights.which) == (WeightGradient, gradient.which)
    assert not list(StageSchedule(schedule, 0).steps())[1][1].split  # nobody waits below


def test_every_instruction_of_ours_has_a_method_of_the_executor():
    assert all(hasattr(Executor, method) for method in METHODS.values())
    assert len(set(METHODS.values())) == len(METHODS)
