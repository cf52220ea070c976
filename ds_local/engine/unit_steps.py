"""What a step is for a unit of the pipeline that is a job of its own: one whose messages may not
come, and one that is served again for the units above."""

from __future__ import annotations

import time
from typing import Any

import torch

from ds_local.checkpoints.folder import complete_tags
from ds_local.engine.instructions import StageSchedule
from ds_local.engine.loaders import iterator_of
from ds_local.engine.stopping import Stopping
from ds_local.engine.unit_links import UnitLinks, WholePipeline
from ds_local.engine.updates import StageUpdates
from ds_local.links.device import to_host
from ds_local.links.line import StepVoid
from ds_local.links.messages import copied_to
from ds_local.outputs import remove
from ds_local.outputs.checkpoint_names import tag_of
from ds_local.replicas.elastic import ElasticGroup, Mean

_AGAIN_SECONDS = 0.2


class UnitSteps(StageUpdates):
    """Steps of units. A part of `LocalPipelineEngine`."""

    units: UnitLinks | WholePipeline
    _stopping: Stopping
    _others_mean: Mean | None = None
    # methods of the engine
    _run: Any
    _batches: Any
    _failures_reported: Any
    run_instruction: Any
    wait_for_save: Any

    def _admit(self) -> None:
        """A replica that has come back goes on from here with the others."""
        if self.units.group is not None:
            self.units.group.admit(self.global_steps, self._hand_over)

    def _run_or_leave_out(self, schedule: StageSchedule) -> None:
        """A step. Where its messages do not come but other replicas have theirs, this one takes
        their mean; where none has, all try again."""
        while True:
            try:
                return self._run(schedule, self._batches())
            except StepVoid as void:
                self.executor.leave_out()
                for parameter in self.module.parameters():
                    parameter.grad = None
                if self.asks_others(void.final):
                    break
                self._admit()
        for instruction in list(schedule)[-1]:
            self.run_instruction(instruction)
        return None

    def reduce_gradients(self) -> None:
        """Over the replicas of this stage, be they ranks of this job or jobs of their own."""
        if self.units.group is not None:
            self._average_with_those_here(self.units.group)
        super().reduce_gradients()

    def _average_with_those_here(self, group: ElasticGroup) -> None:
        """Means of gradients and losses over the replicas that have some in this step, each a job
        of its own. Whoever asks for the end of the run is heard by all."""
        executor = self.executor
        parameters = [p for weights in self._weights.values() for p in weights]
        own = self.module.local_segments
        sizes = [p.numel() for p in parameters]
        mean, self._others_mean = self._others_mean, None
        if mean is None:
            there = [p.grad is not None for p in parameters]
            filled = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            counted = [executor.counted.get(segment, (0.0, 1)) for segment in own]
            weights = [weight / count for weight, count in counted]
            losses = [executor.losses.get(s, torch.zeros(())) for s in own]
            stops = float(executor.stop_after is not None and executor.stop_after <= executor.step)
            told = [float(one) for one in there] + weights + [stops]
            read = to_host([*filled, *losses]).float()
            read[-len(own) :] *= torch.tensor(weights)
            numbers = torch.cat([read, torch.tensor(told)])
            mean = group.average(executor.step, numbers, self._size_of_mean)
        assert mean is not None, "this replica has something"
        self.units.tell_whether_others_go_on(mean.present > 1)
        rest = self._size_of_mean - sum(sizes) - len(own)
        here, told_ = mean.numbers.split([sum(sizes) + len(own), rest])
        # a copy: gradients are clipped in place, and another replica may still ask for the mean
        *gradients, losses_ = copied_to(here, self.device).value().split([*sizes, len(own)])
        *there_, stops = told_.tolist()
        there_, weights_ = there_[: len(parameters)], there_[len(parameters) :]
        for parameter, gradient, present in zip(parameters, gradients, there_, strict=True):
            if present:
                parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
        self.segment_losses = {
            segment: loss / weight
            for segment, loss, weight in zip(own, losses_, weights_, strict=True)
            if weight
        }
        if stops:
            executor.stop_after = executor.step

    @property
    def _size_of_mean(self) -> int:
        """Gradients; then for each segment its loss; what is there, weights, a wish to stop."""
        parameters = [p for weights in self._weights.values() for p in weights]
        of_segments = 2 * len(self.module.local_segments)
        return sum(p.numel() for p in parameters) + len(parameters) + of_segments + 1

    def asks_others(self, final: bool) -> bool:
        """This replica has nothing of the step: take the mean of the others. False: they have
        nothing either, and it is to be tried again.

        Args:
            final: this one will never have.
        """
        units, step = self.units, self.executor.step
        assert units.group is not None, "without replicas nothing is left out"
        self._others_mean = units.group.average(step, None, self._size_of_mean, final)
        if self._others_mean is None:
            time.sleep(_AGAIN_SECONDS)
            return False
        units.leave_out(step, trains=True)
        return True

    def _hand_over(self) -> list[str]:
        """The state of this replica, for one that comes back."""
        assert isinstance(self.units, UnitLinks), "nobody else has replicas that come back"
        folder, tag = self.units.handover, tag_of(self.global_steps)
        self.save_checkpoint(str(folder), tag, save_latest=False)
        self.wait_for_save()
        for old in set(complete_tags(folder)) - {tag}:
            remove(folder / old)
        return [str(folder), tag]

    def serve_batch(self, step: int, data_iter: Any = None) -> None:
        """The forwards of a step that this unit has in its weights already, for the units above.

        Args:
            step: from 0.
            data_iter: as for `train_batch`.
        """
        if data_iter is not None:
            self.set_dataiterator(iterator_of(data_iter))
        self.module.train()
        with (
            self._failures_reported(f"step {step + 1}, of which it has the update"),
            torch.no_grad(),
        ):
            schedule = self.plan.schedule_at(step)
            self.executor.begin(step, schedule, self._batches())
            try:
                for micro_batch in range(schedule.num_micro_batches):
                    for segment in self.module.local_segments:
                        self.executor.serve(segment, micro_batch)
            except StepVoid:
                self.executor.leave_out()
                self.units.leave_out(step, trains=True)
            self.executor.finish()
            self.units.done(step + 1)

    def skip_to(self, step: int) -> None:
        """Go on as if so many steps were done: those in between are lost to this stage."""
        while self.global_steps < step:
            self.global_steps += 1
            self.global_samples += self.train_batch_size()
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()

    @property
    def reads_data(self) -> bool:
        """Has this rank the first segment?"""
        return 0 in self.module.local_segments

    def _tell_units(self) -> None:
        """What the ranks of a unit tell each other, and the units below, beside the steps."""
        self.units.arrange()
        if self._stopping.requested:
            self.units.stop()
