"""A Hugging Face model over pipeline stages, in ten lines.

    deepspeed --num_gpus 2 examples/causal_lm.py         # or plain python: one process

The token ids are random here; `scripts/train.py` is the real loop, with data, validation, saving.
"""

import itertools

import torch

import ds_local

CONFIG = "ds_config.json"


def main() -> None:
    model = ds_local.causal_lm("configs/gpt2-nano.json", config=CONFIG, seq_len=128)
    engine, *_ = ds_local.initialize(model=model, config=CONFIG)
    data = itertools.repeat(torch.randint(0, 4096, (4, 128)))  # token ids [B, T]
    for step in range(10):
        loss = engine.train_batch(data)  # this stage's own loss
        print(f"step {step + 1}, stage {engine.stage_id}: loss {loss.item():.3f}", flush=True)
    engine.destroy()


if __name__ == "__main__":
    main()
