"""A script of the shape of DeepSpeed's pipeline tutorial: layers in a row, a data set, a loop.

deepspeed --num_gpus 2 examples/ports/pipeline_before.py --deepspeed_config CONFIG
"""

import argparse

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from torch import nn

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
    net = PipelineModule(
        layers=layers_in_a_row(),
        loss_fn=nn.CrossEntropyLoss(),
        num_stages=args.pipeline_parallel_size,
        partition_method="parameters",
    )
    engine, _, _, _ = deepspeed.initialize(
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
