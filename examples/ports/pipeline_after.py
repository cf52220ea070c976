"""`pipeline_before.py` with ds_local; the mode is in the "local_parallel" section of the config.

deepspeed --num_gpus 2 examples/ports/pipeline_after.py --deepspeed_config CONFIG
"""

import argparse

import deepspeed
import torch
from torch import nn

import ds_local

WIDTH, CLASSES = 64, 10


class Images(torch.utils.data.Dataset):
    """256 pictures of 3 x 8 x 8, each of a class that can be seen in it."""

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self.labels = torch.randint(0, CLASSES, (256,), generator=generator)
        patterns = torch.randn(CLASSES, 3, 8, 8, generator=generator)
        self.images = patterns[self.labels] + torch.randn(256, 3, 8, 8, generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def layers_in_a_row():
    hidden = [layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True))]
    flat = [lambda images: torch.flatten(images, 1), nn.Linear(3 * 8 * 8, WIDTH)]
    return [*flat, *hidden, nn.Linear(WIDTH, CLASSES)]


class Head(nn.Linear):  # what a segment before the last learns from, where the mode gives it a loss
    def forward(self, hidden, labels):
        return nn.functional.cross_entropy(super().forward(hidden), labels)


def get_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pipeline-parallel-size", type=int, default=2)
    parser.add_argument("--backend", default="gloo")
    parser.add_argument("--seed", type=int, default=1138)
    parser.add_argument("--save")
    return deepspeed.add_config_arguments(parser).parse_args()


def train_pipe(args):
    torch.manual_seed(args.seed)
    net = ds_local.LocalPipelineModule(
        layers=layers_in_a_row(),
        loss_fn=nn.CrossEntropyLoss(),
        num_stages=args.pipeline_parallel_size,
        head=lambda segment: Head(WIDTH, CLASSES),
        config=args.deepspeed_config,
    )
    engine, _, _, _ = ds_local.initialize(
        args=args,
        model=net,
        model_parameters=[p for p in net.parameters() if p.requires_grad],
        training_data=Images(),
    )
    for step in range(args.steps):
        loss = engine.train_batch()
        if engine.is_last_stage():
            print(f"step {step + 1}: loss {loss.item():.7f}", flush=True)
    if args.save:
        engine.save_checkpoint(args.save)


if __name__ == "__main__":
    args = get_args()
    deepspeed.init_distributed(dist_backend=args.backend)
    train_pipe(args)
