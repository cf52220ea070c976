"""Experts: the router loss is a part of what every segment learns from, as the library counts it
for the segment's layers."""

import jobs
import pytest
import torch
from families import MIXTRAL
from ranks import run_ranks
from reference import EPSILON, SEED, batch, table_of
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import (
    MixtralTopKRouter,
    load_balancing_loss_func,
)

from ds_local.config.sections import HeadConfig
from ds_local.model import blocks, families
from ds_local.model.hf_layers import to_hf

COEFFICIENT, STEPS, GAS = 0.5, 4, 2


def layers_of():
    config = families.load_model_config(MIXTRAL)
    return config, [
        blocks.Embedding(config, SEED),
        *(blocks.Block(config, index, SEED) for index in range(4)),
        blocks.Readout(config, SEED),
    ]


def train(section, stages, clip=0.0, recompute=0, steps=STEPS):
    """(reports of all steps, this rank's weights)."""
    engine = jobs.build(
        section, stages, gas=GAS, model=MIXTRAL, gradient_clipping=clip, recompute=recompute
    )
    seen = []
    engine.reports.listeners.append(
        lambda rows: seen.append([(row.loss, row.router_loss) for row in rows])
    )
    data = jobs.batches(engine)
    for _ in range(steps):
        engine.train_batch(data)
    engine.reports.flush()
    return {"reports": seen, "state": jobs.state_of(engine)}


def optimizer(parameters):
    return torch.optim.AdamW(list(parameters), lr=1e-2, eps=EPSILON, weight_decay=0.0)


@pytest.mark.parametrize("mode", ["local", "backprop", "chunked"])
@pytest.mark.parametrize("interval", [1, 2, 3])
def test_recomputed_blocks_count_their_routers_once(mode, interval):
    section = {"mode": mode, "segments_per_stage": 2}
    plain, again = (run_ranks(train, 1, section, 1, 0.0, every)[0] for every in (0, interval))
    assert again["reports"] == plain["reports"]
    for name, tensor in plain["state"].items():
        assert torch.equal(again["state"][name], tensor), name


def test_one_segment_learns_what_hugging_faces_loss_says():
    config, layers = layers_of()
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    state = {i: layer.state_dict() for i, layer in enumerate(layers)}
    model.load_state_dict(to_hf(config, state))
    adam, losses = optimizer(model.parameters()), []
    for step in range(STEPS):
        sums = [0.0, 0.0]
        for micro_batch in range(GAS):
            ids = batch(step, micro_batch, 0)
            out = model(input_ids=ids, labels=ids, output_router_logits=True)
            (out.loss / GAS).backward()
            router = out.aux_loss.item()
            sums[0] += (out.loss.item() - COEFFICIENT * router) / GAS
            sums[1] += router / GAS
        adam.step()
        adam.zero_grad()
        losses.append(sums)
    ours = run_ranks(train, 1, {"mode": "backprop"}, 1)[0]
    for got, expected in zip(ours["reports"], losses, strict=True):
        assert got[0] == pytest.approx(expected, rel=1e-4)
    found = {
        number: {
            name.split(".", 1)[1]: tensor
            for name, tensor in ours["state"].items()
            if name.split(".")[0] == str(number)
        }
        for number in range(6)
    }
    for name, tensor in to_hf(config, found).items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=2e-4, atol=2e-5)


def reference(mode):
    """Two segments of two blocks in one process: what they learn from, written down anew."""
    config, layers = layers_of()
    head = blocks.make_head(config, 0, SEED, HeadConfig(), [0, 3, 6])
    gates: list[torch.Tensor] = []
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, MixtralTopKRouter):
                module.register_forward_hook(lambda _, __, out: gates.append(out[0]))
    lower, upper = nn.ModuleList([*layers[:3], head]), nn.ModuleList(layers[3:])
    adams = [optimizer(segment.parameters()) for segment in (lower, upper)]
    for step in range(STEPS):
        for micro_batch in range(GAS):
            ids = batch(step, micro_batch, 0)
            gates.clear()
            state = ids
            for layer in layers[:3]:
                state = layer(state)
            middle = state["hidden_states"]
            state = middle if mode == "backprop" else middle.detach()
            for layer in layers[3:5]:
                state = layer(state)
            routers = [load_balancing_loss_func(tuple(gates[i : i + 2]), 4, 2) for i in (0, 2)]
            loss = layers[5].loss(state["hidden_states"], ids)
            if mode == "backprop":  # one loss: half a router loss of each half of the blocks
                loss = loss + COEFFICIENT * sum(routers) / 2
            else:
                loss = loss + head(middle, ids) + COEFFICIENT * sum(routers)
            (loss / GAS).backward()
        for adam in adams:
            adam.step()
            adam.zero_grad()
    return {
        f"{number}.{name}": parameter
        for number, layer in enumerate(layers)
        for name, parameter in layer.named_parameters()
    }


PARTS = [0, 2, 3, 4, 6]  # a block each


def by_table(table, factors):
    """Four segments in one process: every loss has one router loss, dealt out among the blocks that
    it trains, and its gradient goes to all of these."""
    config, layers = layers_of()
    ends = range(len(PARTS) - 2)
    made = [blocks.make_head(config, s, SEED, HeadConfig(), PARTS) for s in ends]
    gates: list[torch.Tensor] = []
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, MixtralTopKRouter):
                module.register_forward_hook(lambda _, __, out: gates.append(out[0]))
    trunks = [[*layers[1 + s].parameters()] for s in range(4)]
    trunks[0] += layers[0].parameters()
    tops = [[*head.parameters()] for head in (*made, layers[5])]
    adams = [optimizer([*trunk, *top]) for trunk, top in zip(trunks, tops, strict=True)]
    for step in range(2):
        for micro_batch in range(GAS):
            ids = batch(step, micro_batch, 0)
            gates.clear()
            state, losses = layers[0](ids), []
            for segment in range(4):
                state = layers[1 + segment](state)["hidden_states"]
                top = layers[5].loss if segment == 3 else made[segment]
                losses.append(top(state, ids))
            routers = [load_balancing_loss_func((gate,), 4, 2) for gate in gates]
            for loss, row in table.items():
                routed = sum(routers[segment] for segment in row) / len(row)
                whole = losses[loss] + COEFFICIENT * routed
                for parameters, weight in ((tops[loss], 1.0), *((trunks[s], row[s]) for s in row)):
                    found = torch.autograd.grad(whole, parameters, retain_graph=True)
                    for parameter, gradient in zip(parameters, found, strict=True):
                        before = 0.0 if parameter.grad is None else parameter.grad
                        parameter.grad = before + gradient * weight * factors[loss] / GAS
        for adam in adams:
            adam.step()
            adam.zero_grad()
    return {f"{n}.{name}": p for n, one in enumerate(layers) for name, p in one.named_parameters()}


@pytest.mark.parametrize(
    ("row", "split"),
    [
        ({"mode": "overlapping", "window": 2}, 0),
        ({"mode": "overlapping", "window": 3, "combine": "mean"}, 1),
        ({"mode": "interlocking", "window": 3}, 0),
        ({"mode": "deep_supervision"}, 1),
        ({"mode": "deep_supervision", "weights": [0.5, 0.25, 0.0, 1.0]}, 0),
    ],
    ids=str,
)
def test_a_router_loss_trains_all_that_its_loss_trains(row, split):
    options = {key: row[key] for key in ("window", "combine", "weights") if key in row}
    table = table_of(row["mode"], 4, **options)
    factors = row.get("weights", [1.0] * 4)
    if "weights" in row:  # the table has them as weights of segments
        table = {loss: dict.fromkeys(found, 1.0) for loss, found in table.items()}
    expected = by_table(table, factors)
    section = {**row, "segments_per_stage": 2, "parts": PARTS, "split_backward": split}
    for result in run_ranks(train, 2, section, 2, 0.0, 0, 2):
        for name, tensor in result["state"].items():
            if not name.startswith("heads."):
                torch.testing.assert_close(tensor, expected[name], rtol=2e-4, atol=2e-5)


def refused(section, model):
    import ds_local

    try:
        jobs.build(section, 1, gas=GAS, model={**MIXTRAL, **model})
    except ds_local.ConfigError as error:
        return str(error)


def test_correction_with_a_router_loss_is_refused():
    mix = [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]
    section = {"mix": mix, "correction": 1.0, "segments_per_stage": 2}
    said = run_ranks(refused, 1, section, {})[0]
    assert "local_parallel.correction is 1.0" in said
    assert run_ranks(refused, 1, section, {"router_aux_loss_coef": 0.0})[0] is None


@pytest.mark.parametrize(("mode", "split"), [("local", 0), ("backprop", 0), ("backprop", 1)])
def test_segments_have_the_router_loss_of_their_own_blocks(mode, split):
    expected = reference(mode)
    per_stages = {}
    for stages in (1, 2):
        section = {"mode": mode, "segments_per_stage": 2 // stages, "parts": [0, 3, 6]}
        section["split_backward"] = split
        results = run_ranks(train, stages, section, stages)
        per_stages[stages] = results[0]["reports"]
        for result in results:
            for name, tensor in result["state"].items():
                if not name.startswith("heads."):
                    torch.testing.assert_close(tensor, expected[name], rtol=2e-4, atol=2e-5)
    assert per_stages[1] == per_stages[2]  # to the bit
    assert all(router > 0 for step in per_stages[1] for _, router in step)
