"""What the death of a stage costs: units that are jobs of their own beside one job of all stages.

Real processes of one machine, killed at random while they train; a supervisor starts what has died
again. Everything is compared with a run in which nobody dies.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from ds_local.checkpoints.metrics_file import METRICS_FILE
from ds_local.measure.fleet import Fleet, Job, lost_steps, train_words
from ds_local.schedules.units import folder_of

MODEL = {
    "model_type": "gpt2",
    "n_layer": 8,
    "n_embd": 64,
    "n_head": 4,
    "vocab_size": 512,
    "n_positions": 64,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "initializer_range": 0.07,
    "tie_word_embeddings": False,
}
EVALUATES, KEEPS = 100, 2  # steps between validations; checkpoints of each job


class Layout(NamedTuple):
    """Stages and replicas."""

    stages: int
    replicas: int

    def __str__(self) -> str:
        return f"{self.stages} x {self.replicas}"


class Campaign:
    """Runs of one layout and length.

    Args:
        folder: for everything that is written.
        data: prepared text.
        steps: of a run.
        saves: steps between two checkpoints, of a unit or of the one job.
        depth: of links.
    """

    def __init__(
        self, folder: Path, data: Path, layout: Layout, steps: int, saves: int, depth: int
    ) -> None:
        self.folder, self.data, self.layout = folder, data, layout
        self.steps, self.saves, self.depth = steps, saves, depth
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.json").write_text(json.dumps(MODEL))

    def _options(self, output: Path, reconnects: float) -> dict[str, Any]:
        config = {
            "train_micro_batch_size_per_gpu": 8,
            "gradient_accumulation_steps": 4,
            "steps_per_print": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
            "scheduler": {
                "type": "WarmupCosineLR",
                "params": {"total_num_steps": self.steps, "warmup_num_steps": 20},
            },
            "local_parallel": {
                "mode": "local",
                "num_stages": self.layout.stages,
                "link": {"depth": self.depth, "reconnect_seconds": reconnects},
            },
        }
        path = self.folder / f"{output.name}.json"
        path.write_text(json.dumps(config))
        return {
            "model": self.folder / "model.json",
            "data": self.data,
            "output": output,
            "max_steps": self.steps,
            "eval_every": EVALUATES,
            "eval_sequences": 64,
            "save_every": self.saves,
            "keep_last": KEEPS,
            "resume": True,
            "deepspeed_config": path,
        }

    def units(self, name: str) -> Fleet:
        """A job for each unit."""
        output, jobs = self.folder / name, {}
        logs = self.folder / f"{name}-logs"
        logs.mkdir(parents=True, exist_ok=True)
        for unit, replica in itertools.product(*map(range, self.layout)):
            own = folder_of(unit, replica, self.layout.replicas)
            words = train_words(
                **self._options(output, 600),
                unit=unit,
                replica=replica,
                replicas=self.layout.replicas,
                most_starts_per_hour=0,
            )
            jobs[own] = Job(own, words, output / own / METRICS_FILE, logs)
        return Fleet(jobs)

    def one_job(self, name: str, port: int) -> Fleet:
        """All stages in one job, which its launcher starts again as a whole."""
        output, logs = self.folder / name, self.folder / f"{name}-logs"
        logs.mkdir(parents=True, exist_ok=True)
        number = self.layout.stages * self.layout.replicas
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(number)]
        words += ["--max-restarts", "1000", "--master-port", str(port), "-m", "ds_local", "train"]
        words += train_words(**self._options(output, 0))[4:]
        return Fleet({"all": Job("all", words, output / METRICS_FILE, logs)})


def undisturbed(fleet: Fleet) -> dict[str, Any]:
    """A run in which nobody dies."""
    with fleet:
        first = _first_step(fleet)
        while not fleet.look():
            pass
        return {"train_seconds": fleet.seconds - first}


def _first_step(fleet: Fleet) -> float:
    """When all jobs have told of a step."""
    while min(job.steps() for job in fleet.jobs.values()) < 1 and not fleet.look():
        pass
    return fleet.seconds


def disturbed(fleet: Fleet, steps: int, kills: int, seed: int, most: float) -> dict[str, Any]:
    """Jobs killed one after the other, each once all have gone on since the one before.

    Args:
        most: seconds, after which it is given up.
    """
    draw = random.Random(seed)
    killed: list[dict[str, Any]] = []
    gap = 0.9 * steps / (kills + 1)
    due = gap * draw.uniform(0.5, 1.5)
    with fleet:
        first = _first_step(fleet)
        names = sorted(fleet.jobs)
        while not fleet.look():
            if fleet.seconds > most:
                return {"train_seconds": None, "kills": killed, "given_up": True}
            done = {name: job.steps() for name, job in fleet.jobs.items()}
            if killed and "outage_seconds" not in killed[-1]:
                now, job = killed[-1], fleet.jobs[killed[-1]["job"]]
                if job.starts > now["starts"] and job.steps() > now["step"]:
                    now["outage_seconds"] = round(fleet.seconds - now["at"], 2)
                continue
            late = min(done.values()) > 0.95 * steps  # what dies now is not missed any more
            if len(killed) < kills and min(done.values()) >= due and not late:
                name = draw.choice(names)
                if fleet.jobs[name].is_done:
                    continue
                killed.append(
                    {
                        "job": name,
                        "step": done[name],
                        "at": fleet.seconds,
                        "starts": fleet.jobs[name].starts,
                    }
                )
                fleet.kill(name)
                due = min(done.values()) + gap * draw.uniform(0.5, 1.5)
        seconds = fleet.seconds - first
    ended = {name: len(job.ended) for name, job in fleet.jobs.items()}
    of_kills = {name: sum(k["job"] == name for k in killed) for name in fleet.jobs}
    for one in killed:
        del one["starts"]
        one["at"] = round(one["at"], 1)
    return {
        "train_seconds": round(seconds, 1),
        "kills": killed,
        "other_ends": sum(ended[name] - of_kills[name] for name in fleet.jobs),
    }


def losses(job: Job, split: str = "train") -> dict[int, float | None]:
    return {row["step"]: row["loss"] for row in job.rows() if row["split"] == split}


def equal_below(
    quiet: Fleet, fleet: Fleet, killed: list[dict[str, Any]], saves: int
) -> dict[str, Any]:
    """Losses to the bit beside those of the quiet run: of the lowest unit everywhere, of each other
    one up to the last checkpoint before it or one below it died.

    Args:
        saves: steps between checkpoints.
    """
    compared = equal = 0
    for name, job in fleet.jobs.items():
        unit = int(name.split("-")[1])
        below = [k["step"] - saves for k in killed if 0 < int(k["job"].split("-")[1]) <= unit]
        limit = min(below, default=10**9)
        own, theirs = losses(job), losses(quiet.jobs[name])
        same = [own[step] == theirs.get(step) for step in own if step < limit]
        compared, equal = compared + len(same), equal + sum(same)
    return {"losses_compared": compared, "losses_equal": equal}


def stands_still(stages: int, killed: list[dict[str, Any]]) -> float:
    """Stage-seconds a kill for which a copy of the pipeline learns nothing, from the dead stage on
    upward. The others go on, so the length of the run does not show it."""
    idle = [
        kill["outage_seconds"] * (stages - int(kill["job"].split("-")[1]))
        for kill in killed
        if "outage_seconds" in kill
    ]
    return round(mean(idle), 2)


def study(
    folder: Path, data: Path, layout: Layout, kills: int, base_kills: int, **how: Any
) -> dict[str, Any]:
    """Quiet and disturbed, as units and as one job."""
    steps, seed = how["steps"], how["seed"]
    campaign = Campaign(folder, data, layout, steps, how["saves"], how["depth"])
    stages = layout.stages * layout.replicas
    quiet_fleet = campaign.units("quiet")
    quiet = undisturbed(quiet_fleet)
    fleet = campaign.units("killed")
    found = disturbed(fleet, steps, kills, seed, how["most_seconds"])
    step_seconds = quiet["train_seconds"] / steps
    lost = lost_steps(fleet)
    row = {
        "layout": str(layout),
        "steps": steps,
        "saves_every": how["saves"],
        "depth": how["depth"],
        "quiet_seconds": round(quiet["train_seconds"], 1),
        **found,
        "lost_steps": lost,
    }
    if found["train_seconds"] is not None:
        waited = (found["train_seconds"] - quiet["train_seconds"]) * stages
        row["lost_stage_seconds"] = round((waited + lost * step_seconds) / max(1, kills), 2)
        outages = [k["outage_seconds"] for k in found["kills"] if "outage_seconds" in k]
        row["outage_seconds"] = {"median": median(outages), "most": max(outages)}
        if layout.replicas > 1:
            row["lost_stage_seconds"] = stands_still(layout.stages, found["kills"])
        if layout.replicas == 1:
            row |= equal_below(quiet_fleet, fleet, found["kills"], how["saves"])
        row["validation"] = {
            name: [losses(f.jobs[name], "validation").get(steps) for f in (quiet_fleet, fleet)]
            for name in fleet.jobs
        }
        row["curves"] = [
            sorted(losses(f.jobs[max(f.jobs)], "validation").items()) for f in (quiet_fleet, fleet)
        ]
    if base_kills:
        base = undisturbed(campaign.one_job("quiet-all", how["port"]))
        hit = _killed_ranks(campaign, steps, base_kills, seed, how)
        loss = (hit["train_seconds"] - base["train_seconds"]) * stages / base_kills
        row["restart_all"] = {
            "quiet_seconds": round(base["train_seconds"], 1),
            "train_seconds": round(hit["train_seconds"], 1),
            "kills": base_kills,
            "lost_stage_seconds": round(loss, 2),
        }
    return row


def _killed_ranks(
    campaign: Campaign, steps: int, kills: int, seed: int, how: dict[str, Any]
) -> dict[str, Any]:
    """One job of all stages, a rank of which is killed now and then."""
    import psutil

    draw, number = random.Random(seed), 0
    gap = 0.9 * steps / (kills + 1)
    fleet = campaign.one_job("killed-all", how["port"])
    with fleet:
        first, due = _first_step(fleet), gap
        while not fleet.look() and fleet.seconds < how["most_seconds"]:
            job = fleet.jobs["all"]
            if number < kills and job.steps() >= due:
                ranks = psutil.Process(job.process.pid).children()
                if ranks:
                    draw.choice(ranks).kill()
                    number += 1
                    due += gap
                    time.sleep(1.0)
        return {"train_seconds": fleet.seconds - first, "kills": number}
