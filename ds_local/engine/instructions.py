"""A stage's part of a `Schedule` as DeepSpeed pipeline instructions: compute, with the transfers
put in where they belong."""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import (
    OptimizerStep,
    PipeInstruction,
    PipeSchedule,
    ReduceGrads,
)

from ds_local.schedules.schedule import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Schedule


class LoadMicroBatch(PipeInstruction):
    """Read the next micro-batch (first segment only)."""


class RecvActivation(PipeInstruction):
    """Take a micro-batch's hidden state and labels from the segment below."""


class ForwardPass(PipeInstruction):
    """Run the segment's layers."""


class SendActivation(PipeInstruction):
    """Send the hidden state and labels onward, before any loss is computed."""


class RecvGrad(PipeInstruction):
    """Take the gradient of a loss from the segment above."""


class GradientPass(PipeInstruction):
    """One autograd pass of the segment; the first that needs the segment's own loss runs the
    head."""


class WeightGradient(PipeInstruction):
    """Compute the weight gradients that a split pass has deferred."""


class SendGrad(PipeInstruction):
    """Send the gradient of a loss to the segment below."""


METHODS = {
    LoadMicroBatch: "load_micro_batch",
    RecvActivation: "recv_activation",
    ForwardPass: "forward_pass",
    SendActivation: "send_activation",
    RecvGrad: "recv_grad",
    GradientPass: "gradient_pass",
    SendGrad: "send_grad",
    WeightGradient: "weight_gradient",
}
"""Instruction -> method of `executor.Executor`."""


class StageSchedule(PipeSchedule):
    """One stage's part of a `Schedule` as DeepSpeed instructions; transfers are put in where they
    belong."""

    def __init__(self, whole: Schedule, stage_id: int, with_step: bool = True) -> None:
        super().__init__(
            micro_batches=whole.num_micro_batches, stages=whole.num_stages, stage_id=stage_id
        )
        self.whole = whole
        self._instructions = [
            *self._compute_and_transfers(),
            *([[ReduceGrads(), OptimizerStep()]] if with_step else []),
        ]

    def steps(self) -> Iterator[list[PipeInstruction]]:
        yield from self._instructions

    def num_pipe_buffers(self) -> int:
        """Micro-batches alive at once. The engine keeps them by name, not in numbered buffers."""
        return self.whole.peak_live[self.stage_id]

    def _compute_and_transfers(self) -> Iterator[list[PipeInstruction]]:
        for action in self.whole.stages[self.stage_id]:
            at = {"segment": action.segment, "micro_batch": action.micro_batch}
            if action.kind == FORWARD:
                first, last = action.segment == 0, action.segment + 1 == len(self.whole.stage_of)
                at["ahead"] = action.ahead
                yield [
                    LoadMicroBatch(**at) if first else RecvActivation(**at),
                    ForwardPass(**at),
                ] + ([] if last else [SendActivation(**at)])
                continue
            if action.kind == WEIGHT_GRADIENT:
                yield [WeightGradient(**at, which=action.which)]
                continue
            one = self.whole.route(action)
            received = [RecvGrad(**at, loss=loss) for loss in self.whole.received(action)]
            sent = [] if one.sends is None else [SendGrad(**at, loss=one.sends)]
            split = one.weights and action.kind == INPUT_GRADIENT
            yield [*received, GradientPass(**at, which=action.which, split=split), *sent]
