"""Loading: compared before a weight changes, in words; and the optimizer's fp32 copies follow."""

import json
import logging
import shutil

import jobs
import pytest
import torch
from ranks import run_ranks
from samples import sampled
from test_checkpoint import _seal

LOCAL = {"mode": "local"}
BF16 = {"bf16": {"enabled": True}}
ZERO = {"zero_optimization": {"stage": 1}}
PRECISIONS = {"fp32": {}, "bf16": BF16, "bf16 ZeRO-1": {**BF16, **ZERO}, "fp32 ZeRO-1": ZERO}
SCHEDULER = {
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 1e-2}}
}


def train(engine, steps, start=None):
    data = jobs.batches(engine, start=engine.global_steps if start is None else start)
    return [engine.train_batch(data).item() for _ in range(steps)]


def save(folder, steps, section=LOCAL, stages=2, more=0, **settings):
    """Train and save; losses of the steps after it, and the state that was saved."""
    engine = jobs.build(section, stages, **settings)
    train(engine, steps)
    state = jobs.state_of(engine)
    engine.save_checkpoint(folder)
    return train(engine, more), state


# --- fp32 copies of the weights
# -------------------------------------------------------------------------------------------------


def masters(engine):
    """(fp32 copy, weights) of each flat group of this rank."""
    optimizer = engine.optimizer
    rank = torch.distributed.get_rank(engine.grid.get_data_parallel_group())
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        pairs = zip(
            optimizer.fp32_groups_flat_partition, optimizer.bf16_partitioned_groups, strict=True
        )
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        pairs = zip(
            optimizer.single_partition_of_fp32_groups,
            optimizer.parallel_partitioned_bit16_groups,
            strict=True,
        )
    else:
        return []
    return [(master.detach(), parts[rank].detach()) for master, parts in pairs]


def load_in_every_way(folder, settings, ways):
    """What each way of loading gives an engine that has trained on something else."""
    engine = jobs.build(LOCAL, 2, **settings)
    engine.load_checkpoint(folder, load_module_only=True)
    weights = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    found = []
    for way in ways:
        train(engine, 4, start=900)  # the first two have a rate of 0
        step, exact = engine.global_steps, [master.clone() for master, _ in masters(engine)]
        if way == "module":
            engine.module.load_state_dir(f"{folder}/global_step3", engine.checkpoint_engine)
        elif way == "state dict":
            engine.module.load_state_dict(weights)
        else:
            engine.load_checkpoint(folder, **way)
        pairs = masters(engine)
        found.append(
            {
                "state": jobs.state_of(engine),
                "rounded": all(torch.equal(master.to(w.dtype), w) for master, w in pairs),
                "equal": all(torch.equal(master, w.float()) for master, w in pairs),
                "changed": all(
                    not torch.equal(a, b) for a, (b, _) in zip(exact, pairs, strict=True)
                ),
                "step": engine.global_steps - step,
                "losses": train(engine, 3, start=3),
            }
        )
    return found


WAYS = [
    {},
    {"load_lr_scheduler_states": False},
    {"load_optimizer_states": False},
    {"load_optimizer_states": False, "load_lr_scheduler_states": False},
    {"load_module_only": True},
    {"load_module_only": True, "load_module_strict": False},
    {"load_module_strict": False},
    {"load_optimizer_states": False, "load_module_strict": False},
    "module",
    "state dict",
]


@pytest.mark.parametrize("precision", sampled(["fp32 ZeRO-1"], [*PRECISIONS]))
def test_fp32_copies_follow_whatever_was_loaded(tmp_path, precision):
    settings = {**PRECISIONS[precision], **SCHEDULER, "gas": 2}
    ranks = 4 if "ZeRO" in precision else 2  # ZeRO shares out among replicas
    # all ways where there is most to follow, else one of two
    ways = {"bf16 ZeRO-1": WAYS, "fp32 ZeRO-1": WAYS[1::2]}.get(precision, WAYS[::2])
    straight = run_ranks(save, ranks, str(tmp_path), 3, more=3, **settings)
    for (losses, saved), results in zip(
        straight, run_ranks(load_in_every_way, ranks, str(tmp_path), settings, ways), strict=True
    ):
        for way, found in zip(ways, results, strict=True):
            assert all(
                torch.equal(saved[name], tensor) for name, tensor in found["state"].items()
            ), way
            assert found["rounded"], way
            assert found["changed"], way
            of_optimizer = way == {} or (
                isinstance(way, dict)
                and "load_optimizer_states" not in way
                and "load_module_only" not in way
            )
            assert found["equal"] or of_optimizer, way
            assert found["losses"][0] == losses[0], way
            if of_optimizer and "load_lr_scheduler_states" not in way:
                assert found["losses"] == losses
            else:
                assert max(found["losses"]) < losses[0] + 0.3, (way, found["losses"], losses)
            module_only = isinstance(way, str) or "load_module_only" in way
            assert module_only == (found["step"] == 0)


@pytest.mark.parametrize("precision", ["bf16", "bf16 ZeRO-1"])
def test_fp32_copies_follow_when_the_config_leaves_the_saved_ones_alone(tmp_path, precision):
    settings = {**PRECISIONS[precision]}
    settings["zero_optimization"] = {
        **settings.get("zero_optimization", {}),
        "load_from_fp32_weights": False,
    }
    run_ranks(save, 2, str(tmp_path), 3, **settings)
    for results in run_ranks(
        load_in_every_way, 2, str(tmp_path), settings, [{}, {"load_optimizer_states": False}]
    ):
        assert all(found["equal"] and found["changed"] for found in results)


# --- what does not fit
# --------------------------------------------------------------------------------------------------


def refusal(folder, section=LOCAL, stages=2, how=None, settings=None):
    """(what loading says, is everything as it was?, has any other rank gone on?)"""
    engine = jobs.build(section, stages, **(settings or {}))
    train(engine, 1)
    before, copies = jobs.state_of(engine), [master.clone() for master, _ in masters(engine)]
    try:
        engine.load_checkpoint(folder, **(how or {}))
        return "loaded", False
    except RuntimeError as error:
        said = f"{type(error).__name__}: {error}"
    after = jobs.state_of(engine)
    same = all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    same &= all(torch.equal(a, b) for a, (b, _) in zip(copies, masters(engine), strict=True))
    train(engine, 1)  # and training goes on
    torch.distributed.barrier()
    return said, same


def refused(folder, *words, ranks=2, error="CheckpointError", **settings):
    """All ranks refuse in one sentence with these words, and nothing has changed."""
    for said, same in run_ranks(refusal, ranks, str(folder), **settings):
        assert said.startswith(f"{error}: "), said
        assert "\n" not in said
        assert all(word in said for word in words), said
        assert same


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(save, 2, str(folder), 1)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def forge(folder, name, change):
    """Change what is in a file, with checksums that are right."""
    path = folder / "global_step1" / name
    content = torch.load(path, weights_only=False)
    torch.save(change(content), path)
    _seal(folder / "global_step1", name)


def first(content):
    return next(name for name, value in content.items() if isinstance(value, torch.Tensor))


FORGERIES = {
    "unknown": lambda content: {**content, "strange": torch.zeros(2)},
    "missing": lambda content: {
        name: value for name, value in content.items() if name != first(content)
    },
    "shape": lambda content: {**content, first(content): content[first(content)][..., :-1]},
    "no tensor": lambda content: {**content, first(content): 3},
    "no dict": lambda content: list(content.values()),
}


@pytest.mark.parametrize("name", ["layer_04-model_states.pt", "head_00-model_states.pt"])
@pytest.mark.parametrize("forgery", FORGERIES)
def test_tensors_of_another_model(copy, name, forgery):
    content = torch.load(copy / "global_step1" / name, weights_only=False)
    words = {"unknown": ["unknown strange"], "no dict": []}.get(forgery, [first(content)])
    forge(copy, name, FORGERIES[forgery])
    refused(copy, name, *words)


def set_in(*path, value=None):
    def change(content):
        place = content
        for key in path[:-1]:
            place = place[key]
        if value is None:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        return content

    return change


STATES = {
    "no optimizer": (set_in("optimizer"), "'optimizer' is missing"),
    "no step": (set_in("global_steps"), "'global_steps' is missing"),
    "another step": (set_in("global_steps", value=9), "of step 9, ds_local.json of step 1"),
    "a step in words": (set_in("global_steps", value="1"), "'global_steps' is missing or wrong"),
    "no groups": (set_in("optimizer", "param_groups"), "another optimizer"),
    "an empty group": (
        set_in("optimizer", "param_groups", 0, "params", value=[0]),
        "groups of [1] parameters",
    ),
    "a moment": (
        set_in("optimizer", "state", 2, "exp_avg", value=torch.ones(1)),
        "exp_avg of parameter 2",
    ),
    "a strange moment": (
        set_in("optimizer", "state", 999, value={"exp_avg": torch.ones(1)}),
        "parameter 999",
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_states_that_are_not_a_stages(copy, state):
    change, words = STATES[state]
    forge(copy, "mp_rank_01_model_states.pt", change)
    refused(copy, words)


def test_models_of_another_size(checkpoint):
    refused(
        checkpoint,
        "tokens.weight is [64, 32] there, [64, 16] in this run",
        settings={"model": {"n_embd": 16}},
    )
    refused(checkpoint, "6 layers, this run has 7", settings={"model": {"n_layer": 5}})
    refused(
        checkpoint,
        "6 layers, this run has 5",
        settings={"model": {"n_layer": 3}},
        how={"load_module_only": True},
    )
    refused(
        checkpoint,
        "[64, 32] there, [65, 32]",
        settings={"model": {"vocab_size": 65}},
        how={"load_module_only": True},
    )


OTHER_OPTIMIZER = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


def test_another_optimizer_is_refused_with_what_helps(checkpoint):
    words = "the state of the optimizer adamw, this run has sgd", "load_optimizer_states=False"
    refused(
        checkpoint, *words, "--resume --allow-change optimizer", settings=OTHER_OPTIMIZER,
        error="MoveError",
    )  # fmt: skip
    how = {"load_optimizer_states": False}
    for said, _ in run_ranks(refusal, 2, str(checkpoint), how=how, settings=OTHER_OPTIMIZER):
        assert said == "loaded"


def taken_where_it_fits(folder, allowed, settings):
    from ds_local.engine.loading import load_what_fits

    engine = jobs.build(LOCAL, 2, **settings)
    said = load_what_fits(engine, folder, None, allowed)
    train(engine, 1)
    return said, engine.global_steps


def test_a_resume_may_leave_the_optimizer_or_the_scheduler_behind(checkpoint):
    for said, step in run_ranks(
        taken_where_it_fits, 2, str(checkpoint), ["optimizer", "scheduler"], OTHER_OPTIMIZER
    ):
        assert said.startswith("the optimizer starts afresh (")
        assert said.endswith("has the state of the optimizer adamw, this run has sgd)")
        assert step == 2
    for said, _ in run_ranks(taken_where_it_fits, 2, str(checkpoint), ["scheduler"], SCHEDULER):
        assert said == "the scheduler starts afresh"
    for said, _ in run_ranks(taken_where_it_fits, 2, str(checkpoint), ["optimizer"], {}):
        assert said == ""


def test_a_scheduler_that_the_checkpoint_does_not_have(checkpoint, tmp_path):
    refused(
        checkpoint,
        "has no scheduler, this run has WarmupLR",
        "load_lr_scheduler_states=False",
        settings=SCHEDULER,
    )
    how = {"load_lr_scheduler_states": False}
    assert [
        said for said, _ in run_ranks(refusal, 2, str(checkpoint), how=how, settings=SCHEDULER)
    ] == ["loaded"] * 2
    run_ranks(save, 2, str(tmp_path), 1, **SCHEDULER)
    other = {
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": 9, "warmup_num_steps": 2},
        }
    }
    refused(tmp_path, "has WarmupLR, this run has WarmupCosineLR", settings=other)


def test_shards_of_another_optimizer(tmp_path):
    run_ranks(save, 2, str(tmp_path), 1, **BF16)
    name = "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt"
    path = ("optimizer_state_dict", "single_partition_of_fp32_groups")
    whole = (tmp_path / "global_step1" / name).read_bytes()
    for change in (
        set_in(*path),
        set_in(*path, value=[torch.zeros(3)]),
        set_in("optimizer_state_dict", value=3),
    ):
        forge(tmp_path, name, change)
        refused(tmp_path, name, settings=BF16)
        (tmp_path / "global_step1" / name).write_bytes(whole)


def test_edited_facts(copy):
    path = copy / "global_step1" / "ds_local.json"
    text = path.read_text()
    for change in (
        {"num_stages": 1},
        {"segment_parts": [0, 2, 6]},
        {"step": 7},
        {"local_parallel": {"seed": 7}},
        {"model": None},
    ):
        path.write_text(json.dumps({**json.loads(text), **change}))
        refused(copy, "ds_local.json")


def older(folder):
    """A checkpoint as the first format had it, from before an option."""
    path = folder / "global_step1" / "ds_local.json"
    facts = json.loads(path.read_text())
    for key in ("optimizer", "scheduler", "seal"):
        del facts[key]
    del facts["local_parallel"]["head"]["temperature"]
    facts["format"] = 1
    path.write_text(json.dumps(facts))


def resumed(folder, tag, steps):
    engine = jobs.build(LOCAL, 2)
    engine.load_checkpoint(folder, tag)
    return engine.global_steps, jobs.state_of(engine), train(engine, steps)


def check_resumed(folder, checkpoint, tag=None):
    straight = run_ranks(resumed, 2, str(checkpoint), None, 2)
    for mine, other in zip(run_ranks(resumed, 2, str(folder), tag, 2), straight, strict=True):
        assert mine[0] == other[0] == 1
        assert all(torch.equal(tensor, other[1][name]) for name, tensor in mine[1].items())
        assert mine[2] == other[2]


def test_older_checkpoints_are_read(copy, checkpoint):
    older(copy)
    check_resumed(copy, checkpoint)


def test_a_checkpoint_that_was_moved_aside_is_found(copy, checkpoint):
    """Killed between the two renames of a tag that is saved again."""
    (copy / "global_step1").rename(copy / ".global_step1.old")
    check_resumed(copy, checkpoint)
    check_resumed(copy, checkpoint, "global_step1")


# --- other programs
# --------------------------------------------------------------------------------------------------


def stock_save(folder):
    from test_stock import stock

    stock("pipeline", 2, 2, 4, folder, True, gradient_clipping=0.0)


def take_weights(folder, settings):
    """As the refusal says: before ds_local.initialize."""
    from reference import MODELS

    import ds_local

    config = jobs.ds_config(LOCAL, **settings)
    module = ds_local.causal_lm(MODELS["gpt2"], num_stages=2, config=config)
    module.load_state_dir(folder)
    engine = ds_local.initialize(model=module, config=config)[0]
    found = jobs.state_of(engine), all(torch.equal(m.to(w.dtype), w) for m, w in masters(engine))
    train(engine, 1)
    return found


def test_a_checkpoint_of_the_stock_pipeline_is_named_and_its_weights_can_be_taken(tmp_path):
    run_ranks(stock_save, 2, str(tmp_path))
    folder = tmp_path / "global_step2"
    for how in ({}, {"tag": "global_step2"}, {"load_module_only": True}):
        refused(
            tmp_path,
            "DeepSpeed's own PipelineEngine",
            f"module.load_state_dir('{folder}')",
            how=how,
        )
    for settings in ({}, BF16):
        for state, followed in run_ranks(take_weights, 2, str(folder), settings):
            assert followed
            for name, tensor in state.items():
                if name.startswith("heads"):
                    continue
                number, own = name.split(".", 1)
                saved = torch.load(
                    folder / f"layer_{int(number):02d}-model_states.pt", weights_only=False
                )[own]
                assert torch.equal(saved.to(torch.bfloat16).float() if settings else saved, tensor)


# --- heads and replicas
# --------------------------------------------------------------------------------------------------


class Told(logging.Handler):
    def __init__(self):
        super().__init__()
        self.sentences = []

    def emit(self, record):
        self.sentences.append(record.getMessage())


def test_a_head_goes_where_the_cut_agrees_and_nowhere_else(checkpoint, tmp_path):
    saved = torch.load(
        checkpoint / "global_step1" / "head_00-model_states.pt", weights_only=False
    )  # after layer 3

    def loaded(section, stages, **settings):
        told, before, after, parts = [], {}, {}, None
        for sentences, own_before, own_after, cut in run_ranks(
            load_weights, stages, str(checkpoint), section, stages, **settings
        ):
            told += sentences
            before |= own_before
            after |= own_after
            parts = cut
        return told, before, after, parts

    told, before, after, parts = loaded(LOCAL, 4)
    assert parts == [0, 2, 3, 4, 6]
    for name, tensor in saved.items():
        assert torch.equal(after[f"heads.1.{name}"], tensor)
        for other in (0, 2):
            assert torch.equal(after[f"heads.{other}.{name}"], before[f"heads.{other}.{name}"])
    assert sum("that of segment 0 starts afresh" in sentence for sentence in told) == 1
    assert sum("that of segment 2 starts afresh" in sentence for sentence in told) == 1
    assert not any("segment 1 starts" in sentence for sentence in told)

    told, before, after, _ = loaded({**LOCAL, "parts": [0, 4, 6]}, 2)
    assert torch.equal(after["heads.0.readout.weight"], before["heads.0.readout.weight"])
    assert any("that of segment 0 starts afresh" in sentence for sentence in told)

    told, before, after, _ = loaded({**LOCAL, "head": {"rank": 4}}, 2)  # another kind of head
    assert torch.equal(after["heads.0.readout.weight"], before["heads.0.readout.weight"])
    assert any("that of segment 0 starts afresh" in sentence for sentence in told)


def load_weights(folder, section, stages, **settings):
    engine = jobs.build(section, stages, **settings)
    logger, told = logging.getLogger("DeepSpeed"), Told()
    logger.addHandler(told)
    before = jobs.state_of(engine)
    try:
        engine.load_checkpoint(folder, load_module_only=True)
    finally:
        logger.removeHandler(told)
    return told.sentences, before, jobs.state_of(engine), engine.module.segment_parts


def apart(sync, **options):
    return {"mode": "local", "segments_per_stage": 2, "replicas": {"sync": sync, **options}}


SUBNETS = {"every": 3, "scale": "none"}
# (saved with, loaded with, is what the replicas had of their own left out?)
REPLICAS = {
    "the same": (apart("subnets", **SUBNETS), apart("subnets", **SUBNETS), False),
    "another rule for moments": (
        apart("subnets", **SUBNETS),
        apart("subnets", **SUBNETS, optimizer_state="reset"),
        False,
    ),
    "another interval of subnets": (
        apart("subnets", **SUBNETS),
        apart("subnets", **{**SUBNETS, "every": 4}),
        True,
    ),
    "another partition": (
        apart("subnets", **SUBNETS),
        apart("subnets", **SUBNETS, partition=["mlp"]),
        True,
    ),
    "another seed": (apart("subnets", **SUBNETS), {**apart("subnets", **SUBNETS), "seed": 7}, True),
    "gradients": (apart("subnets", **SUBNETS), apart("gradients"), True),
    "another interval of averages": (apart("periodic", every=3), apart("periodic", every=5), False),
    "no outer step": (
        apart("periodic", every=3),
        apart("periodic", every=3, outer_lr=1.0, outer_momentum=0.0),
        True,
    ),
    "from gradients": (apart("gradients"), apart("periodic", every=3), False),
}


@pytest.mark.parametrize(  # from and to every kind of replicas
    "case",
    sampled(
        ["another rule for moments", "another partition", "gradients", "no outer step"], [*REPLICAS]
    ),
)
def test_what_replicas_have_of_their_own_is_never_left_out_in_silence(tmp_path, case):
    saved_with, loaded_with, left_out = REPLICAS[case]
    # in the middle of a round
    own = run_ranks(save, 2, str(tmp_path), 4, saved_with, 1, gas=2)
    found = run_ranks(load_and_compare, 2, str(tmp_path), loaded_with)
    told = [
        sentence for sentences, _ in found for sentence in sentences if "is left out" in sentence
    ]
    assert len(told) == (1 if left_out else 0), told
    if not left_out:
        for (_, state), (_, mine) in zip(own, found, strict=True):
            assert all(torch.equal(tensor, mine[name]) for name, tensor in state.items())


def load_and_compare(folder, section):
    engine = jobs.build(section, 1, gas=2)
    logger, told = logging.getLogger("DeepSpeed"), Told()
    logger.addHandler(told)
    try:
        engine.load_checkpoint(folder)
    finally:
        logger.removeHandler(told)
    state = jobs.state_of(engine)
    train(engine, 2)  # over the next exchange
    return told.sentences, state


def test_a_replicas_file_that_is_not_one(tmp_path):
    section = apart("periodic", every=3)
    run_ranks(save, 2, str(tmp_path), 1, section, 1)
    name = "replica_01-stage_00-model_states.pt"
    whole = (tmp_path / "global_step1" / name).read_bytes()
    for change in (
        set_in("tensors"),
        set_in("tensors", "1.block.ln_1.weight"),
        set_in("common"),
        set_in("velocity", value={}),
    ):
        forge(tmp_path, name, change)
        refused(tmp_path, name, section=section, stages=1)
        (tmp_path / "global_step1" / name).write_bytes(whole)
