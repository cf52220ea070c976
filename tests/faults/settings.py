"""Bad settings: keys and values of ds_config.json at every level, numbers of the command line, keys
and values of a model's config; misspelt, of a wrong type, NaN, infinite, negative, huge, "auto",
contradictory, of packages that are not there.

Right: refused before any step, in one sentence that names the key, within 10 s, and no process
stays.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from judging import Outcome, refused
from workbench import MODEL, SETTINGS, Bench

NAN, INFINITE = float("nan"), float("inf")

# --- values that are wrong for what a place holds -------------------------------------------------

NO_NUMBER: tuple[Any, ...] = ("three", NAN, [], {}, "auto")
COUNT = (*NO_NUMBER, -1, 0, 2.5, INFINITE, True)
SIZE = (*COUNT, 10**12)  # of something that is held in memory
STEPS = (*NO_NUMBER, -1, 2.5)
NOT_NEGATIVE = (*NO_NUMBER, -0.5)
POSITIVE = (*NO_NUMBER, -0.5, 0, INFINITE, -INFINITE)
SECONDS = (*POSITIVE, 1e300)
SHARE = (*NO_NUMBER, -0.5, 1.5)
FLAG: tuple[Any, ...] = ("perhaps", 2, [], {}, "auto", NAN)
CHOICE: tuple[Any, ...] = ("nonsense", 5, {}, NAN, True)
OBJECT: tuple[Any, ...] = (True, 5, "on", [1], NAN)
PER_SEGMENT: tuple[Any, ...] = (
    "three",
    5,
    [1.0],
    [1.0, 1.0, 1.0],
    [1.0, -1.0],
    [NAN, 1.0],
    ["a", 1.0],
    {},
)


class Place(NamedTuple):
    """A key, named by its path from the top: numbers are positions in a list.

    Attributes:
        right: a value that is accepted, written under a misspelt key; None: the key is not
            misspelt.
        wrong: values to be refused.
        beside: path -> value of other keys that make the key meaningful.
    """

    path: str
    right: Any
    wrong: tuple[Any, ...]
    beside: Mapping[str, Any] = MappingProxyType({})


def _section(path: str, right: Any, wrong: tuple[Any, ...], **beside: Any) -> Place:
    others = {f"local_parallel.{key.replace('__', '.')}": value for key, value in beside.items()}
    return Place(f"local_parallel.{path}", right, wrong, others)


MIX = [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]
PHASES = [{"mode": "local", "until_step": 4}, {"mode": "backprop"}]
PLACES = (
    Place("train_batch_size", 8, (*SIZE, 9)),
    Place("train_micro_batch_size_per_gpu", 2, SIZE),
    Place("gradient_accumulation_steps", 4, SIZE),
    Place("gradient_clipping", 1.0, NOT_NEGATIVE),
    Place("steps_per_print", 1, COUNT),
    Place("wall_clock_breakdown", False, FLAG),
    Place("prescale_gradients", False, FLAG),
    Place("dataloader_drop_last", False, FLAG),
    Place("communication_data_type", "fp32", CHOICE),
    Place("optimizer", SETTINGS["optimizer"], OBJECT),
    Place("optimizer.type", "AdamW", CHOICE),
    Place("optimizer.params", {"lr": 0.01, "torch_adam": True}, OBJECT),
    Place("optimizer.params.lr", 0.01, ("three", "1e-3", NAN, INFINITE, -0.5, [], {}, "auto")),
    Place("optimizer.params.betas", [0.9, 0.95], ("auto", 0.9, [0.9], [0.9, 1.5], [NAN, 0.9], ["a", 0.9], {})),
    Place("optimizer.params.eps", 1e-8, NOT_NEGATIVE),
    Place("optimizer.params.weight_decay", 0.1, NOT_NEGATIVE),
    Place("scheduler", SETTINGS["scheduler"], OBJECT),
    Place("scheduler.type", "WarmupCosineLR", CHOICE),
    Place("scheduler.params", {"total_num_steps": 20}, OBJECT),
    Place("scheduler.params.total_num_steps", 20, NO_NUMBER),
    Place("scheduler.params.warmup_num_steps", 2, (*NO_NUMBER, -1)),
    Place("scheduler.params.cos_min_ratio", 0.1, NO_NUMBER),
    Place("scheduler.params.warmup_type", "linear", CHOICE),
    Place("bf16", {"enabled": False}, OBJECT),
    Place("bf16.enabled", False, FLAG),
    Place("fp16", {"enabled": False}, OBJECT),
    Place("fp16.enabled", False, (True, "auto", "perhaps", [])),
    Place("zero_optimization", {"stage": 1}, OBJECT),
    Place("zero_optimization.stage", 1, (2, 3, -1, 1.5, "one", NAN, [], {}, "auto")),
    Place("zero_optimization.reduce_bucket_size", 10**6, (*NO_NUMBER, -1)),
    Place("zero_optimization.overlap_comm", False, FLAG),
    Place("activation_checkpointing", {}, OBJECT),
    Place("pipeline", {}, OBJECT),
    Place("pipeline.activation_checkpoint_interval", 0, STEPS),
    Place("data_types", {}, OBJECT),
    Place("data_types.grad_accum_dtype", "fp32", CHOICE),
    Place("csv_monitor", {"enabled": False}, OBJECT),
    Place("csv_monitor.enabled", False, FLAG),
    Place("csv_monitor.output_path", "out", (5, [], {})),
    Place("flops_profiler", {"enabled": False}, OBJECT),
    Place("flops_profiler.profile_step", 1, STEPS, {"flops_profiler.enabled": False}),
    Place("checkpoint", {}, OBJECT),
    Place("checkpoint.tag_validation", "Warn", CHOICE),
    Place("tensorboard.enabled", None, (True,)),
    Place("wandb.enabled", None, (True,)),
    Place("comet.enabled", None, (True,)),
    Place("local_parallel", {}, OBJECT),
    _section("mode", "local", (*CHOICE, "LOCAL", ["local"])),
    _section("window", 2, (*SIZE, 3), mode="chunked"),
    _section("combine", "sum", CHOICE, mode="overlapping"),
    _section("weights", [1.0, 1.0], PER_SEGMENT, mode="deep_supervision"),
    _section("mix", MIX, ([], "local", 5, {}, [5], [{}, {}], [{"mode": "local", "micro_batches": 9}])),
    _section("mix.0.mode", "backprop", CHOICE, mix=MIX),
    _section("mix.0.micro_batches", 1, ("three", NAN, [], -1, 0, 2.5, 9), mix=MIX),
    _section("correction", 0.5, SHARE, mix=MIX),
    _section("num_stages", 2, (*COUNT, 3, 10**12)),
    _section("segments_per_stage", 1, (*SIZE, 3)),
    _section("phases", PHASES, ([], "local", 5, {}, [5], [PHASES[1], PHASES[0]], [PHASES[0], PHASES[0]])),
    _section("phases.0.until_step", 4, COUNT, phases=PHASES),
    _section("cycle_steps", 8, COUNT, phases=PHASES),
    _section("partition", "uniform", (5, [], {}, "/nowhere/profile.json")),
    _section("parts", [0, 3, 6], ("three", 5, [0], [0, 3], [0, 6, 3], [1, 3, 6], [0, 3, 7], [0, 2.5, 6], [0, -3, 6])),
    _section("layout", {}, OBJECT),
    _section("layout.stages", "across_nodes", CHOICE),
    _section("layout.start_timeout_seconds", 10.0, SECONDS),
    _section("link", {}, OBJECT),
    _section("link.depth", 4, (*SIZE, 10**9)),
    _section("link.warn_seconds", 60.0, SECONDS),
    _section("link.transfer", 0.0, (*NOT_NEGATIVE, INFINITE)),
    _section("link.timeout_seconds", 20.0, SECONDS),
    _section("link.past_host", False, (*FLAG, True)),
    _section("link.codec", "int8", ("nonsense", 5, {}, ["int8", "int8"], ["nonsense"])),
    _section("link.group_size", 8, (*COUNT, 3), link__codec="int8"),
    _section("link.keep", 0.5, (*SHARE, 0), link__codec="topk"),
    _section("link.rank", 4, COUNT, link__codec="lowrank"),
    _section("head", {}, OBJECT),
    _section("head.blocks", 1, ("three", NAN, {}, "auto", -1, 2.5, [1, 2, 3])),
    _section("head.blocks_from", "new", CHOICE),
    _section("head.readout", "private", CHOICE),
    _section("head.refresh_every", 20, COUNT),
    _section("head.tracking", 0.9, SHARE),
    _section("head.init", "new", CHOICE),
    _section("head.rank", 8, SIZE),
    _section("head.temperature", False, FLAG),
    _section("head.token_fraction", 0.5, (*SHARE, 0)),
    _section("head.vocabulary", 8, (*SIZE, 10**9)),
    _section("head.rare_samples", 8, (*SIZE, 10**9), head__vocabulary=8),
    _section("head.companion", 0.5, NOT_NEGATIVE),
    _section("head.every", 1, COUNT),
    _section("head.kernel", "torch", (*CHOICE, "liger", "cce")),
    _section("split_backward", 1, (*NO_NUMBER, -1, 3, 1.5)),
    _section("compile", False, FLAG),
    _section("replicas", {}, OBJECT),
    _section("replicas.sync", "gradients", CHOICE),
    _section("replicas.every", 15, COUNT, replicas__sync="periodic"),
    _section("replicas.partition", ["mlp"], ("mlp", 5, {}, ["nonsense"], [5]), replicas__sync="subnets"),
    _section("replicas.scale", "eval", CHOICE, replicas__sync="subnets"),
    _section("replicas.optimizer_state", "carry", CHOICE, replicas__sync="subnets"),
    _section("replicas.outer_lr", 0.7, POSITIVE, replicas__sync="periodic"),
    _section("replicas.outer_momentum", 0.9, SHARE, replicas__sync="periodic"),
    _section("seed", 1, ("three", NAN, [], {}, 2.5)),
    _section("diagnostics", False, FLAG),
    _section("lr_multipliers", [1.0, 1.0], PER_SEGMENT),
    _section("clip_multipliers", [1.0, 1.0], PER_SEGMENT),
    _section("warmup_stagger", 0, STEPS),
    _section("on_nonfinite", {"skip": 3}, ("nonsense", 5, [], {"slip": 3}, {"skip": -1}, {"skip": "x"}, {"skip": NAN})),
)  # fmt: skip

# of the command line: option -> (values, other options)
OPTIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "max_steps": (("three", -1, 2.5, "nan", None), {}),
    "eval_every": (("three", -1, 2.5), {}),
    "save_every": (("three", -1, 2.5), {}),
    "eval_sequences": (("three", -1), {}),
    "num_stages": (("two", 0, -1, 3, 2.5), {}),
    "segments_per_stage": (("two", 0, -1, 9), {}),
    "mode": (("locall", "LOCAL", "1"), {}),
    "window": (("two", 0, -1, 99, 2), {}),
    "backprop_micro_batches": (("some", -1, 99, 2.5), {}),
    "backprop_from": (("three", -1), {"mode": "local"}),
    "seed": (("three", 2.5), {}),
    "data": ((None,), {}),
    "model": ((None,), {}),
    "output": ((None,), {}),
    "deepspeed_config": ((None,), {}),
    "max_stepz": ((3,), {}),
    "evaluate": ((True,), {}),
}

# keys of a model's config: (values, misspelt forms)
MODEL_KEYS: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "n_layer": (("four", 0, -1, 2.5, [], NAN), ("n_layers", "n_layr", "nlayer")),
    "n_embd": (("wide", 0, -1, 33, 2.5, [], NAN), ("n_embed", "n_emb", "nembd")),
    "n_head": (("four", 0, -1, 5, 2.5, NAN), ("n_heads", "n_haed")),
    "n_positions": (("long", 0, -1, 8, 2.5), ("n_position", "n_postions")),
    "vocab_size": (("large", 0, -1, 10, 2.5, 10**6), ("vocab_sise", "vocabsize")),
    "resid_pdrop": (("some", -0.1, 1.5, NAN), ("resid_drop", "resid_pdrp")),
    "initializer_range": (("some", -0.1, NAN), ("initialiser_range",)),
    "layer_norm_epsilon": (("some", NAN), ("layer_norm_eps", "layernorm_epsilon")),
    "activation_function": (("gelu_neww", 5), ("activation_functon",)),
    "model_type": (("gpt22", 5, None, "bert", "t5"), ()),
}

# what contradicts itself: (settings by path, what may be named)
CONTRADICTIONS: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({"optimizer": None}, ("optimizer",)),
    ({"local_parallel.mode": "local", "local_parallel.mix": MIX}, ("mix",)),
    ({"local_parallel.mode": "local", "local_parallel.window": 2}, ("window",)),
    ({"local_parallel.mode": "interlocking", "local_parallel.window": 3}, ("window",)),
    ({"local_parallel.link": {"group_size": 8}}, ("group_size",)),
    ({"local_parallel.link": {"codec": "int8", "keep": 0.5}}, ("keep",)),
    ({"local_parallel.clip_multipliers": [1, 1], "bf16": {"enabled": True}}, ("clip_multipliers",)),
    ({"local_parallel.diagnostics": True, "bf16": {"enabled": True}}, ("diagnostics",)),
    ({"local_parallel.replicas": {"sync": "periodic"}, "zero_optimization": {"stage": 1}}, ("sync",)),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, ("fp16",)),
    ({"train_batch_size": 8, "gradient_accumulation_steps": 3}, ("train_batch_size",)),
    ({"local_parallel.mix": [{"mode": "backprop", "micro_batches": 5}, {"mode": "local"}]}, ("mix",)),
    ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, ("offload_optimizer",)),
    ({"compile": {"deepcompile": True}}, ("deepcompile",)),
    ({"elasticity": {"enabled": True}}, ("elasticity",)),
    ({"pipeline": {"use_reentrant": True}}, ("use_reentrant",)),
    ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, ("torch_autocast",)),
)  # fmt: skip


# --- cases ----------------------------------------------------------------------------------------


def cases(seed: int, count: int) -> list[dict[str, Any]]:
    """One case of every place and kind before a second one of any."""
    rng = random.Random(f"settings {seed}")
    groups = [*map(_of_place, PLACES), *map(_of_option, OPTIONS), *map(_of_model, MODEL_KEYS)]
    groups.append(
        [{"settings": settings, "names": list(names)} for settings, names in CONTRADICTIONS]
    )
    for group in groups:
        rng.shuffle(group)
    rng.shuffle(groups)
    ordered = [
        group[turn]
        for turn in range(max(map(len, groups)))
        for group in groups
        if turn < len(group)
    ]
    return ordered[:count]


def _of_place(place: Place) -> list[dict[str, Any]]:
    key = place.path.rpartition(".")[2]
    found = [
        {"settings": {**place.beside, place.path: value}, "names": names_of(place.path)}
        for value in place.wrong
    ]
    for misspelt in misspellings(key) if place.right is not None else ():
        path = f"{place.path.rpartition('.')[0]}.{misspelt}".lstrip(".")
        # a key that is needed stays away under its own name
        found.append(
            {"settings": {**place.beside, place.path: None, path: place.right}, "names": [misspelt]}
        )
    return found


def names_of(path: str) -> list[str]:
    """What a sentence about a key may name: the key, or the one above a position in a list."""
    parts = [part for part in path.split(".") if not part.isdigit()]
    return [parts[-1]] if len(parts) == 1 or parts[-1] != "enabled" else [parts[-2]]


def misspellings(key: str) -> list[str]:
    """A letter left out, doubled, and two that changed places."""
    middle = len(key) // 2
    swapped = key[: middle - 1] + key[middle] + key[middle - 1] + key[middle + 1 :]
    forms = [
        key[:middle] + key[middle + 1 :],
        key[:middle] + key[middle] * 2 + key[middle + 1 :],
        swapped,
    ]
    return [form for form in dict.fromkeys(forms) if form != key]


def _of_option(option: str) -> list[dict[str, Any]]:
    values, others = OPTIONS[option]
    name = option.replace("_", "-") if option != "deepspeed_config" else option
    return [{"options": {**others, option: value}, "names": [name, option]} for value in values]


def _of_model(key: str) -> list[dict[str, Any]]:
    values, misspelt = MODEL_KEYS[key]
    found = [{"model": {key: value}, "names": [key]} for value in values]
    right = MODEL.get(key, 320 if key == "vocab_size" else 1e-5)
    return found + [{"model": {key: None, form: right}, "names": [form]} for form in misspelt]


def play(bench: Bench, case: dict[str, Any]) -> Outcome:
    folder = bench.folder()
    options = {"max_steps": 2, "save_every": 0, **case.get("options", {})}
    command = bench.arguments(folder, case.get("settings"), case.get("model"), **options)
    return refused(bench.server.start("train.py", command, ranks=2), case["names"])
