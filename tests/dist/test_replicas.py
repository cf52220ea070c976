"""Replicas that train apart: equality with plain training and with a one-process emulation, exact
resumption, failures."""

from __future__ import annotations

import copy
import itertools

import jobs
import pytest
import torch
from ranks import run_ranks
from reference import Reference, batch, table_of
from samples import sampled

from ds_local.replicas.cuts import deal

CLOSE = {"rtol": 2e-4, "atol": 2e-5}
PLAIN_AVERAGE = {"sync": "periodic", "every": 2, "outer_lr": 1.0, "outer_momentum": 0.0}


def section_of(replicas, **more):
    return {"mode": "local", "segments_per_stage": 2, "replicas": replicas, **more}


@pytest.mark.parametrize(
    "replicas", [{"sync": "subnets", "every": 2}, PLAIN_AVERAGE], ids=["subnets", "plain average"]
)
def test_one_replica_is_plain_training_bit_for_bit(replicas):
    family = "llama" if replicas["sync"] == "subnets" else "gpt2"
    plain, apart = (
        run_ranks(jobs.train, 1, section_of(r), 1, 5, family=family)[0] for r in ({}, replicas)
    )
    assert plain["own"] == apart["own"]
    assert plain["eval"] == apart["eval"]
    assert all(torch.equal(tensor, apart["state"][name]) for name, tensor in plain["state"].items())


# --- against one process --------------------------------------------------------------------------


def merged_training(section, stages, steps, **settings):
    """Train; the model of all replicas afterwards, this replica's own numbers of elements,
    evaluation, bytes by step."""
    engine = jobs.build(section, stages, **settings)
    data = jobs.batches(engine)
    sent = []
    for _ in range(steps):
        before = engine.replicas.num_bytes
        engine.train_batch(data)
        sent.append(engine.replicas.num_bytes - before)
    engine.eval_batch(jobs.batches(engine, start=10_000))
    own = {name: tensor.shape for name, tensor in jobs.state_of(engine).items()}
    moments = {
        name: {key: value.shape for key, value in engine.optimizer.state[parameter].items()}
        for name, parameter in engine.module.named_parameters()
    }
    with engine.replicas.whole():
        whole = jobs.state_of(engine)
    return {
        "whole": whole,
        "own": own,
        "moments": moments,
        "eval": engine.eval_losses,
        "sent": sent,
    }


# where units lie in a block, by the definition of the models: name -> (kind, dimension, repeats)
WHERE = {
    "gpt2": {
        "attn.c_attn.weight": ("attention_heads", 1, 3),
        "attn.c_attn.bias": ("attention_heads", 0, 3),
        "attn.c_proj.weight": ("attention_heads", 0, 1),
        "mlp.c_fc.weight": ("mlp", 1, 1),
        "mlp.c_fc.bias": ("mlp", 0, 1),
        "mlp.c_proj.weight": ("mlp", 0, 1),
    },
    "llama": {
        "self_attn.q_proj.weight": ("attention_heads", 0, 1),
        "self_attn.k_proj.weight": ("attention_heads", 0, 1),
        "self_attn.v_proj.weight": ("attention_heads", 0, 1),
        "self_attn.o_proj.weight": ("attention_heads", 1, 1),
        "mlp.gate_proj.weight": ("mlp", 0, 1),
        "mlp.up_proj.weight": ("mlp", 0, 1),
        "mlp.down_proj.weight": ("mlp", 1, 1),
    },
}
UNITS = {"gpt2": {"attention_heads": 4, "mlp": 128}, "llama": {"attention_heads": 2, "mlp": 48}}
OUTPUTS = {
    "gpt2": {"attn.c_proj": "attention_heads", "mlp.c_proj": "mlp"},
    "llama": {"self_attn.o_proj": "attention_heads", "mlp.down_proj": "mlp"},
}


class Emulation:
    """Replicas in one process on weights of full size: what a replica does not hold is masked out
    of its forward pass, and is put back, moments too, after its optimizer's step."""

    def __init__(
        self,
        family,
        parts,
        replicas,
        every,
        factors=(1.0, 1.0),
        rule="carry",
        partition=("attention_heads", "mlp"),
    ):
        self.family, self.every, self.factors, self.rule, self.partition = (
            family,
            every,
            factors,
            rule,
            partition,
        )
        self.models = [Reference(family, parts) for _ in range(replicas)]
        self.masks: list[dict] = [{} for _ in self.models]  # (layer, kind) -> units held
        self.scales = [1.0] * replicas
        for replica, model in enumerate(self.models):
            for layer in range(1, 5):
                for name, kind in OUTPUTS[family].items():
                    if kind in partition:
                        self._mask(
                            model.layers[layer].block.get_submodule(name), replica, layer, kind
                        )
        self._deal(0)

    def _mask(self, module, replica, layer, kind):
        def only_own(_, args):
            held = self.masks[replica].get((layer, kind))
            if held is None:
                return (args[0] * self.factors[1],)
            return (
                args[0] * held.repeat_interleave(args[0].shape[-1] // len(held)) * self.factors[0],
            )

        module.register_forward_pre_hook(only_own)

    def _deal(self, round_):
        for layer, kind in itertools.product(range(1, 5), self.partition):
            units = UNITS[self.family][kind]
            for replica, share in enumerate(
                deal(1234, round_, layer, kind, units, len(self.models))
            ):
                self.masks[replica][layer, kind] = torch.zeros(units).index_fill(0, share, 1.0)

    def held(self, replica, layer, name, shape):
        """1 where an entry of a block's parameter is the replica's, None for a shared one."""
        kind, dim, repeats = WHERE[self.family].get(name, ("", 0, 0))
        if kind not in self.partition:
            return None
        units = self.masks[replica][layer, kind]
        line = units.repeat_interleave(shape[dim] // repeats // len(units)).repeat(repeats)
        return line.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape).bool()

    def entries(self):
        """(parameter and optimizer state of every replica, mask of every replica or None), for each
        parameter."""
        models = self.models
        for i, layer in enumerate(models[0].layers):
            for name, parameter in layer.named_parameters():
                masks = [
                    self.held(r, i, name.removeprefix("block."), parameter.shape)
                    for r in range(len(models))
                ]
                yield (
                    [dict(m.layers[i].named_parameters())[name] for m in models],
                    None if masks[0] is None else masks,
                )
        for s in range(len(models[0].heads)):
            for name, _ in models[0].heads[s].named_parameters():
                yield [dict(m.heads[s].named_parameters())[name] for m in models], None

    def state_of(self, replica, parameter):
        return next(
            (o.state[parameter] for o in self.models[replica].optimizers if parameter in o.state),
            {},
        )

    def tensors(self, replica, parameter):
        state = self.state_of(replica, parameter)
        return [parameter.data, *(state[key] for key in ("exp_avg", "exp_avg_sq") if key in state)]

    def step(self, number, gas, table):
        for replica, model in enumerate(self.models):
            before = [
                [t.clone() for t in self.tensors(replica, p[replica])] for p, _ in self.entries()
            ]
            model.step([batch(number, m, replica) for m in range(gas)], [table] * gas)
            for (parameters, masks), kept in zip(self.entries(), before, strict=True):
                if masks is not None:
                    tensors = self.tensors(replica, parameters[replica])
                    for i, tensor in enumerate(tensors):
                        old = kept[i] if i < len(kept) else torch.zeros_like(tensor)
                        tensor.copy_(torch.where(masks[replica], tensor, old))
        if (number + 1) % self.every == 0:
            self.merge()
            self._deal((number + 1) // self.every)
            self._forget()

    def merge(self):
        for parameters, masks in self.entries():
            together = zip(*(self.tensors(r, p) for r, p in enumerate(parameters)), strict=True)
            for tensors in together:
                stacked = torch.stack(tensors)
                new = stacked.mean(0) if masks is None else (stacked * torch.stack(masks)).sum(0)
                for tensor in tensors:
                    tensor.copy_(new)

    def _forget(self):
        for optimizer in (optimizer for model in self.models for optimizer in model.optimizers):
            if self.rule == "reset":
                optimizer.state.clear()
            elif self.rule == "keep_second_moment":
                for state in optimizer.state.values():
                    state["exp_avg"].zero_()

    def evaluate(self, gas):
        """Every segment's loss of the merged model."""
        self.masks = [{} for _ in self.models]
        model = self.models[0]
        with torch.no_grad():
            found = [
                model.losses(batch(10_000, m, r), range(model.num_segments))
                for m in range(gas)
                for r in range(len(self.models))
            ]
        return {
            s: sum(losses[s].item() for losses in found) / len(found)
            for s in range(model.num_segments)
        }


CASES = {
    "gpt2": ("gpt2", {"every": 2, "scale": "none"}, (1.0, 1.0), 2, 2),
    "llama, first moments zeroed, sqrt": (
        "llama",
        {"every": 1, "optimizer_state": "keep_second_moment", "scale": "sqrt"},
        (2**0.5, 1.0),
        1,
        2,
    ),
    "gpt2, moments forgotten, eval": (
        "gpt2",
        {"every": 2, "optimizer_state": "reset"},
        (1.0, 0.5),
        1,
        2,
    ),
    "gpt2 on four replicas, MLP alone, train": (
        "gpt2",
        {"every": 3, "partition": ["mlp"], "scale": "train"},
        (4.0, 1.0),
        1,
        4,
    ),
}


@pytest.mark.parametrize("case", sampled([c for c in CASES if "eval" not in c], [*CASES]))
def test_subnets_equal_masked_training_in_one_process(case):
    family, settings, factors, stages, replicas = CASES[case]
    steps, gas = 5, 2  # ends in the middle of a round where it can
    section = {**section_of({"sync": "subnets", **settings}), "segments_per_stage": 2 // stages}
    results = run_ranks(
        merged_training, stages * replicas, section, stages, steps, family=family, gas=gas
    )
    parts = [0, 3, 6]
    rules = {
        "rule": settings.get("optimizer_state", "carry"),
        "partition": settings.get("partition", ("attention_heads", "mlp")),
    }
    emulation = Emulation(family, parts, replicas, settings["every"], factors, **rules)
    for step in range(steps):
        emulation.step(step, gas, table_of("local", 2))
    emulation.merge()
    expected = emulation.models[0].state()
    for result in results:
        assert result["whole"].keys() <= expected.keys()
        for name, tensor in result["whole"].items():
            torch.testing.assert_close(tensor, expected[name], **CLOSE)
    for segment, loss in emulation.evaluate(gas).items():
        assert results[0]["eval"][segment] == pytest.approx(loss, rel=2e-5)
    check_sizes(results, family, replicas, rules["partition"])
    if rules["rule"] == "carry":
        check_bytes(results, family, replicas, settings["every"], rules["partition"])


def check_sizes(results, family, replicas, partition):
    """A replica holds 1/R of what is cut, of the moments too."""
    for result in results:
        for name, tensor in result["whole"].items():
            kind = WHERE[family].get(name.partition(".block.")[2], ("",))[0]
            assert (
                result["own"][name].numel() * (replicas if kind in partition else 1)
                == tensor.numel()
            )
            for key, shape in result["moments"][name].items():
                assert key == "step" or shape == result["own"][name]


def check_bytes(results, family, replicas, every, partition):
    """Nothing between exchanges; then weights and two moments of what changes hands, and 2 (R - 1)
    / R of what is averaged."""
    assert all(
        sent == 0
        for result in results
        for number, sent in enumerate(result["sent"])
        if (number + 1) % every
    )
    sent = sum(sum(result["sent"]) for result in results)
    expected = 0.0
    for result in results[::replicas]:  # one of each stage
        for round_, (name, tensor) in itertools.product(
            range(len(result["sent"]) // every), result["whole"].items()
        ):
            moved = 2.0 * (replicas - 1)  # of the replicas together
            kind = WHERE[family].get(name.partition(".block.")[2], ("",))[0]
            if kind in partition:
                units = UNITS[family][kind]
                old, new = (
                    deal(1234, r, int(name.split(".")[0]), kind, units, replicas)
                    for r in (round_, round_ + 1)
                )
                moved = (
                    1
                    - sum(
                        len(set(a.tolist()) & set(b.tolist()))
                        for a, b in zip(old, new, strict=True)
                    )
                    / units
                )
            expected += 3 * 4 * tensor.numel() * moved
    assert sent == pytest.approx(
        expected, rel=0.02
    )  # shares of averages are padded to equal length


def test_periodic_averaging_is_an_outer_nesterov_step():
    replicas = {"sync": "periodic", "every": 2, "outer_lr": 0.7, "outer_momentum": 0.9}
    results = run_ranks(merged_training, 2, section_of(replicas), 1, 4, gas=2)
    models = [Reference("gpt2", [0, 3, 6]) for _ in range(2)]
    common = copy.deepcopy(models[0].layers), copy.deepcopy(models[0].heads)
    kept = [p for group in common for module in group for p in module.parameters()]
    own = [
        [p for group in (m.layers, m.heads) for module in group for p in module.parameters()]
        for m in models
    ]
    outer = torch.optim.SGD(kept, lr=0.7, momentum=0.9, nesterov=True)
    for step in range(4):
        for replica, model in enumerate(models):
            model.step([batch(step, m, replica) for m in range(2)], [table_of("local", 2)] * 2)
        if step % 2:
            for parameter, *theirs in zip(kept, *own, strict=True):
                parameter.grad = parameter.data - torch.stack([p.data for p in theirs]).mean(0)
            outer.step()
            for parameter, *theirs in zip(kept, *own, strict=True):
                for p in theirs:
                    p.data.copy_(parameter.data)
    expected = models[0].state()
    assert all(
        torch.equal(tensor, results[1]["whole"][name])
        for name, tensor in results[0]["whole"].items()
    )
    for name, tensor in results[0]["whole"].items():
        torch.testing.assert_close(tensor, expected[name], **CLOSE)


# --- checkpoints ----------------------------------------------------------------------------------


def train_save_and_go_on(section, stages, folder, before, after, **settings):
    engine = jobs.build(section, stages, gas=2, **settings)
    data = jobs.batches(engine)
    for _ in range(before):
        engine.train_batch(data)
    engine.save_checkpoint(folder)
    return go_on(engine, data, after)


def resume(section, stages, folder, after, **settings):
    engine = jobs.build(section, stages, gas=2)
    engine.load_checkpoint(folder, **settings)
    return go_on(engine, jobs.batches(engine, start=engine.global_steps), after)


def go_on(engine, data, after):
    found = []
    for _ in range(after):
        engine.train_batch(data)
        found.append({s: loss.item() for s, loss in engine.segment_losses.items()})
    engine.eval_batch(jobs.batches(engine, start=10_000))
    return found, engine.eval_losses, jobs.state_of(engine)


@pytest.mark.parametrize("sync", sampled(["periodic"], ["subnets", "periodic"]))
def test_resume_in_the_middle_of_a_round_continues_with_the_same_bits(tmp_path, sync):
    scale = (
        {"scale": "none"} if sync == "subnets" else {}
    )  # the merged model has no factor that a plain one lacks
    section = section_of({"sync": sync, "every": 3} | scale) | {"segments_per_stage": 1}
    straight = run_ranks(train_save_and_go_on, 4, section, 2, str(tmp_path), 4, 3)
    resumed = run_ranks(resume, 4, section, 2, str(tmp_path), 3)
    for one, other in zip(straight, resumed, strict=True):
        assert one[:2] == other[:2]
        assert all(torch.equal(tensor, other[2][name]) for name, tensor in one[2].items())
    # the same checkpoint as a plain model, for whoever averages gradients
    plain = run_ranks(resume, 4, section_of({}) | {"segments_per_stage": 1}, 2, str(tmp_path), 0)
    whole = run_ranks(resume, 4, section, 2, str(tmp_path), 0)
    assert plain[0][1] == pytest.approx(whole[0][1], rel=1e-6)
    # and the other way round, weights alone
    again = run_ranks(resume, 4, section, 2, str(tmp_path), 0, load_module_only=True)
    assert again[0][1] == pytest.approx(whole[0][1], rel=1e-6)


# --- waiting and failing --------------------------------------------------------------------------


def collectives_between_exchanges(section, steps):
    import torch.distributed as dist

    engine = jobs.build(section, 2)
    data = jobs.batches(engine)
    engine.train_batch(data)
    seen = []
    names = [
        "all_reduce",
        "broadcast",
        "all_gather",
        "reduce_scatter",
        "barrier",
        "all_to_all_single",
        "all_gather_object",
    ]
    saved = {name: getattr(dist, name) for name in names}
    try:
        for name in names:
            setattr(dist, name, lambda *args, _name=name, **kwargs: seen.append(_name))
        before = engine.replicas.num_bytes
        for _ in range(steps):
            engine.train_batch(data)
        return seen, engine.replicas.num_bytes - before
    finally:
        for name, function in saved.items():
            setattr(dist, name, function)


def test_between_exchanges_replicas_do_not_talk():
    section = section_of({"sync": "subnets", "every": 10}) | {"segments_per_stage": 1}
    assert run_ranks(collectives_between_exchanges, 4, section, 4) == [([], 0)] * 4
