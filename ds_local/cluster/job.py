"""A layout as a job: the DeepSpeed config of it, and the command that starts it."""

from __future__ import annotations

import math
import shlex
from typing import Any

from ds_local.cluster.candidates import HEADS, TAILS, Candidate, Cluster, parts_of
from ds_local.cluster.prices import Price
from ds_local.cluster.scheme_samples import section_for
from ds_local.config.catalog import Section, head_of
from ds_local.config.deepspeed import adamw, cosine, stable_decay
from ds_local.errors import ConfigError

CONFIG, START = "ds_config.json", "start.sh"
_LEARNING_RATE = 3e-4  # of a model of some hundred million weights; the planner knows nothing of it


def config_of(
    candidate: Candidate, fp32: bool, steps: int | None, vocab_size: int
) -> dict[str, Any]:
    """What DeepSpeed reads.

    Args:
        fp32: instead of bf16 with fp32 master weights.
        steps: of the run; None: not known, so the learning rate stays as it is.
        vocab_size: of the model.

    Raises:
        ConfigError: when the scheme changes late in a run whose steps are not known.
    """
    section = _scheme_of(candidate, steps)
    head = head_of(HEADS[candidate.heads], vocab_size) if candidate.heads else {}
    # of the readout's loss too; a seventh of the time on a GPU (docs/gpu.md)
    section |= {"num_stages": candidate.stages, "head": {"kernel": "compiled", **head}}
    if candidate.placement != "across_nodes":
        section["layout"] = {"stages": candidate.placement}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": candidate.micro_batch,
        "gradient_accumulation_steps": candidate.micro_batches,
        "gradient_clipping": 1.0,
        "steps_per_print": 10,
        "bf16": {"enabled": not fp32},
        "zero_optimization": {"stage": 1},
        "pipeline": {"activation_checkpoint_interval": int(candidate.recompute)},
        "optimizer": adamw(_LEARNING_RATE),
    }
    if steps is not None:
        warm_up = max(1, steps // 100)
        # a late change of scheme has time to mix at a constant rate
        config["scheduler"] = (
            stable_decay(steps, warm_up, max(1, steps // 5))
            if candidate.scheme in TAILS
            else cosine(steps, warm_up)
        )
    return config | {"local_parallel": section}


def _scheme_of(candidate: Candidate, steps: int | None) -> Section:
    """The "local_parallel" section of its scheme, in phases where it ends in another."""
    parts = [
        section_for(scheme, candidate.micro_batches) for _, scheme in parts_of(candidate.scheme)
    ]
    if len(parts) == 1:
        return parts[0]
    share, _ = parts_of(candidate.scheme)[0]
    if steps is None:
        raise ConfigError(
            f"{candidate.scheme} changes the scheme after {share:.0%} of the steps, and how many "
            "there are is not known; give the tokens of the run, or take another scheme"
        )
    split = max(part.pop("split_backward", 0) for part in parts)
    first, end = parts
    return {
        "phases": [{**first, "until_step": round(share * steps)}, end],
        "split_backward": split,
    }


def steps_for(price: Price, tokens: float | None) -> int | None:
    """Steps of a run that is to end where backpropagation does after so many tokens."""
    if tokens is None:
        return None
    return math.ceil(tokens * price.learning.times / price.tokens)


def start_of(price: Price, cluster: Cluster, model: str, folder: str, steps: int | None) -> str:
    """A script that starts the job, from the root of a checkout."""
    launcher = ["deepspeed", "--num_nodes", str(cluster.nodes)]
    launcher += ["--num_gpus", str(cluster.devices_per_node)]
    hosts = '--hostfile "${HOSTFILE:-configs/hostfile}" ' if cluster.nodes > 1 else ""
    known = '"${STEPS:?the number of steps}"' if steps is None else f'"${{STEPS:-{steps}}}"'
    return (
        "#!/usr/bin/env bash\n"
        f"# {price.candidate}\n"
        "set -euo pipefail\n"
        f"{shlex.join(launcher)} {hosts}scripts/train.py --model {shlex.quote(model)} \\\n"
        '    --data "${DATA:?the folder that prepare_data.py wrote}" '
        '--output "${RUN:?a folder for the run}" \\\n'
        f"    --max-steps {known} --deepspeed "
        f'--deepspeed_config {shlex.quote(f"{folder}/{CONFIG}")} "$@"\n'
    )
