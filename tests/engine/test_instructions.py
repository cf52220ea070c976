"""The instructions of neighbouring stages go with each other."""

from itertools import pairwise

import pytest
from schedule_rows import schedule_of

from ds_local.schedules.routes import MODES


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_every_send_has_its_receive_in_the_neighbour(mode, stages, micro_batches):
    from deepspeed.runtime.pipe.schedule import PipeInstruction

    from ds_local.engine.instructions import (
        ForwardPass,
        LoadMicroBatch,
        RecvActivation,
        RecvGrad,
        SendActivation,
        SendGrad,
        StageSchedule,
    )

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
