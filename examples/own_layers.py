"""Layers of your own: a list of modules, a head for early segments, DeepSpeed's file beside it.

    deepspeed --num_gpus 2 examples/own_layers.py        # or plain python: one process

Each segment but the last learns from the loss of the head that `make_head` gives it.
"""

import torch
from torch import nn

import ds_local

WIDTH, CLASSES = 32, 10

config = {
    "train_micro_batch_size_per_gpu": 16,
    "gradient_accumulation_steps": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
    "local_parallel": {"mode": "local", "seed": 1},
}


class Head(nn.Module):
    """What an early segment learns from: `head(hidden, labels) -> scalar loss`."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(WIDTH, CLASSES)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.readout(hidden), labels)


def batches():
    """Micro-batches `(inputs, labels)`, without end; only the first stage reads them."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(WIDTH, CLASSES, generator=generator)
    while True:
        inputs = torch.randn(16, WIDTH, generator=generator)
        yield inputs, (inputs @ directions).argmax(1)


def main() -> None:
    torch.manual_seed(1)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(6)]
    layers.append(nn.Linear(WIDTH, CLASSES))
    module = ds_local.LocalPipelineModule(
        layers, loss_fn=nn.functional.cross_entropy, head=lambda segment: Head(), config=config
    )
    engine, *_ = ds_local.initialize(model=module, config=config)
    data = batches() if engine.is_first_stage() else None
    for step in range(60):
        loss = engine.train_batch(data)
        if step % 20 == 19:
            print(f"step {step + 1}, stage {engine.stage_id}: loss {loss.item():.3f}", flush=True)
    engine.destroy()


if __name__ == "__main__":
    main()
