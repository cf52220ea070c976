"""A layout as a job: the DeepSpeed config of it, and the command that starts it."""

from __future__ import annotations

import math
import shlex
from typing import Any

from ds_local.cluster.candidates import HEADS, Candidate, Cluster, Price
from ds_local.cluster.row_samples import section_for
from ds_local.config.deepspeed import adamw, cosine

CONFIG, START = "ds_config.json", "start.sh"
_LEARNING_RATE = 3e-4  # of a model of some hundred million weights; the planner knows nothing of it


def config_of(candidate: Candidate, fp32: bool, steps: int | None) -> dict[str, Any]:
    """What DeepSpeed reads.

    Args:
        fp32: instead of bf16 with fp32 master weights.
        steps: of the run; None: not known, so the learning rate stays as it is.
    """
    section = section_for(candidate.row, candidate.micro_batches)
    section |= {"num_stages": candidate.stages}
    if candidate.heads:
        section["head"] = HEADS[candidate.heads].model_dump(exclude_defaults=True)
    if candidate.place != "across_nodes":
        section["layout"] = {"stages": candidate.place}
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
        config["scheduler"] = cosine(steps, max(1, steps // 100))
    return config | {"local_parallel": section}


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
