"""Everything that a rank needs, imported: `ranks.Pool` forks its ranks from a process that has
imported this."""

import gc
import os
from importlib import import_module

gc.disable()  # looks through all that is there again and again while more comes: a second of CPU
# before DeepSpeed looks
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["OMP_NUM_THREADS"] = "1"
for name in (
    "ds_local.engine.initialize",
    "ds_local.engine.causal_lm",
    "ds_local.checkpoints.hf_export",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # by the optimizers of bf16 and ZeRO, seconds
    "transformers.models.gpt2.modeling_gpt2",
):
    import_module(name)
import_module("torch").set_num_threads(1)  # a fork takes no threads along
gc.collect()
gc.freeze()  # what has been imported need not be looked through again
gc.enable()
