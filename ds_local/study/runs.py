"""One training run of the quality study, and its ds_config.json."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ds_local.config.catalog import BACKPROP
from ds_local.config.deepspeed import adamw, cosine, stable_decay
from ds_local.errors import ConfigError
from ds_local.study.methods import DECAY, METHODS, WSD, section_of, switch_step
from ds_local.study.recipes import PRESETS

CHECKPOINTS = 20  # of a run, so that every tail begins at one


class Run(NamedTuple):
    """One training run of the study."""

    preset: str
    method: str
    segments: int
    seed: int
    lr_factor: float
    step_factor: float

    @property
    def name(self) -> str:
        plain = re.sub(r"[ ,%]+", "_", self.method.replace("/", "-")).strip("_")
        longer = "" if self.step_factor == 1 else f"-steps{self.step_factor:g}"
        return f"{plain}-K{self.segments}-seed{self.seed}-lr{self.lr_factor:g}{longer}"

    @property
    def steps(self) -> int:
        return round(PRESETS[self.preset].steps * self.step_factor)

    def switch(self, tail: float) -> int:
        """The step at which such a tail begins."""
        return switch_step(self.steps, tail)

    @property
    def trunk(self) -> Run | None:
        """The same run without a tail, if it is one of the study's."""
        method = METHODS[self.method]
        trunk = method._replace(tail=0.0, end=BACKPROP, renew="")
        plain = [name for name, other in METHODS.items() if method.tail and other == trunk]
        return self._replace(method=plain[0]) if plain else None


def ds_config(run: Run) -> dict[str, Any]:
    """The DeepSpeed config of a run."""
    preset, method = PRESETS[run.preset], METHODS[run.method]
    micro_batches = method.micro_batches or preset.micro_batches
    if preset.sequences % micro_batches:
        raise ConfigError(
            f"{run.method!r} needs {micro_batches} micro-batches a step, which do not divide the "
            f"{preset.sequences} sequences of --preset {run.preset}; take another preset"
        )
    return {
        "train_micro_batch_size_per_gpu": preset.sequences // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 1.0,
        "steps_per_print": 10,
        "optimizer": adamw(preset.learning_rate * run.lr_factor),
        "scheduler": _scheduler(run),
        "local_parallel": {
            **section_of(
                method, run.segments, micro_batches, run.steps, preset.model["vocab_size"]
            ),
            "seed": run.seed,
        },
        **preset.precision,
    }


def _scheduler(run: Run) -> dict[str, Any]:
    if METHODS[run.method].schedule != WSD:
        return cosine(run.steps, max(1, run.steps // 30))
    # the same warm-up at every length, so that runs have a beginning in common
    warm_up = max(1, PRESETS[run.preset].steps // 60)
    return stable_decay(run.steps, warm_up, run.steps - run.switch(DECAY))
