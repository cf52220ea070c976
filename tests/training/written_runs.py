"""A run folder, written by its rows."""

import json

STEPS, PER_STEP = 40, 512


def write_run(folder, event=None, idle=(0.02, 0.4), rising=False, **section):
    """A run of two stages, told by its rows."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(2, STEPS + 1, 2):
        for segment in (0, 1):
            bad = event is not None and segment == 1 and step == event + 1
            rows.append(
                {
                    "step": step,
                    "segment": segment,
                    "stage": segment,
                    "split": "train",
                    "loss": None if bad else 6 - step / 20 - segment / 10,
                    "has_loss": True,
                    "tokens": step * PER_STEP,
                    "seconds": step * 2.0,
                    "nonfinite": "loss" if bad else None,
                    "nonfinite_step": event if bad else None,
                    "skipped": int(event is not None and step > event and segment == 1),
                    "grad_norm": 1.5 + segment,
                    "lr": 0.001 * step,
                    "idle_share": idle[segment],
                    "step_seconds": 2.0,
                    "sent_bytes": 1000,
                    "exchanged_bytes": None,
                    "slowest_link": "activation link 0 -> 1" if segment else None,
                }
            )
            if step % 20 == 0:
                rows.append(
                    {
                        "step": step,
                        "segment": segment,
                        "stage": segment,
                        "split": "validation",
                        "loss": 5.0 + (step / 100 if rising else -step / 100),
                        "memory_bytes": (3 + segment) * 2**30,
                        "tokens": step * PER_STEP,
                        "seconds": step * 2.0,
                    }
                )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 8,
        "local_parallel": section or {"mode": "local"},
    }
    facts = {
        "arguments": {"max_steps": STEPS},
        "config": config,
        "layout": {"stages": 2, "replicas": 1},
        "versions": {"torch": "2.99"},
        "starts": [{"step": 0, "time": "2026-01-01T00:00:00+00:00", "host": "node7"}],
    }
    (folder / "run.json").write_text(json.dumps(facts))
    return folder
