"""The whole loop of `scripts/train.py` in a script of your own, with something added to it.

    deepspeed --num_gpus 2 examples/callbacks.py --data data/python-stdlib     # or plain python

The folder of --data is one that `scripts/prepare_data.py` wrote. Every option of
`scripts/train.py` is a keyword of `ds_local.train`.
"""

import argparse

import ds_local

config = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 4,
    "steps_per_print": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
    "scheduler": {"type": "WSD", "params": {"total_num_steps": 12, "warmup_num_steps": 2}},
    "local_parallel": {"mode": "local"},
}


class UntilGoodEnough(ds_local.Callback):
    """Ends the run at a loss, and keeps that checkpoint under a name of its own."""

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def on_validation(self, run: ds_local.Run, validation: ds_local.Validation) -> None:
        if validation.loss < self.loss:  # the same on every rank
            run.save("good-enough")
            run.end(f"loss below {self.loss}")


class Tell(ds_local.Callback):
    """What happens, and where it is heard of."""

    def on_step(self, run):  # on every rank, whenever it gets there
        own = {segment: round(loss, 3) for segment, loss in run.engine.losses_read.items()}
        print(f"rank {run.engine.global_rank}, step {run.step}: loss of segments {own}", flush=True)

    def on_report(self, run, reports):  # on rank 0, once all segments' figures are there
        print(f"report of step {reports[0].step}: {len(reports)} segments", flush=True)

    def on_save(self, run, tag):
        if run.is_first:
            print(f"saved {tag}", flush=True)

    def on_end(self, run):
        if run.is_first:
            print(f"ended at step {run.step}: {run.ending}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="gpt2-nano.json")
    parser.add_argument("--output", default="runs/callbacks")
    parser.add_argument("--good-enough", type=float, default=5.0)
    parser.add_argument("--local_rank", type=int, default=-1)  # set by the deepspeed launcher
    args = parser.parse_args()
    last = ds_local.train(
        model=args.model,
        data=args.data,
        output=args.output,
        deepspeed_config=config,
        max_steps=12,
        eval_every=4,
        callbacks=[UntilGoodEnough(args.good_enough), Tell()],
    )
    print(f"validation loss {last.loss:.4f} at step {last.step}", flush=True)


if __name__ == "__main__":
    main()
