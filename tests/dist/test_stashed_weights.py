"""Forwards that run ahead against one process that keeps the weights by version, and the same bits
on any number of ranks, whatever comes between steps."""

import jobs
import pytest
import torch
from ranks import run_ranks
from reference import Reference, batch, table_of
from test_rows import compare

AHEAD = {"mode": "backprop", "run_ahead": "auto"}


class ByVersion(Reference):
    """A reference whose layers go forward and backward with the weights of an earlier step."""

    def remember(self, weights):
        """Keep the weights of the layers; those of heads and readout are always the newest."""
        weights.append(
            [
                [p.detach().clone() for p in self._trunk_parameters(s)]
                for s in range(self.num_segments)
            ]
        )

    def step_of_versions(self, micro_batches, tables, versions, weights):
        """One optimizer step.

        Args:
            versions: for each micro-batch the number of each segment's weights in `weights`.
        """
        total, losses = {}, {}
        for ids, table, used in zip(micro_batches, tables, versions, strict=True):
            for segment, version in enumerate(used):
                self._put(segment, weights[version][segment])
            for loss, value in self.losses(ids, table).items():
                losses.setdefault(loss, []).append(value.item())
                own = list(self._head_parameters(loss))
                pairs = [(own, 1.0)]
                pairs += [(self._trunk_parameters(s), w) for s, w in table[loss].items()]
                for parameters, weight in pairs:
                    found = torch.autograd.grad(value, parameters, retain_graph=True)
                    for parameter, gradient in zip(parameters, found, strict=True):
                        scaled = gradient * (weight / len(micro_batches))
                        total[parameter] = (
                            total[parameter] + scaled if parameter in total else scaled
                        )
        for segment in range(self.num_segments):
            self._put(segment, weights[-1][segment])
        for parameter, gradient in total.items():
            parameter.grad = gradient
        for parameters, optimizer in zip(self.parameters, self.optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {loss: sum(values) / len(values) for loss, values in losses.items()}

    def _put(self, segment, values):
        with torch.no_grad():
            for parameter, value in zip(self._trunk_parameters(segment), values, strict=True):
                parameter.data = value.clone()


def reference_run(parts, gas, steps, tables, leads, replicas=1):
    """Segment s with lead a: micro-batch n of the run uses the weights after (n - a) // M steps."""
    model, weights, losses = ByVersion("gpt2", parts), [], []
    for step in range(steps):
        model.remember(weights)
        numbers = range(step * gas, (step + 1) * gas)
        versions = [
            [max(0, (n - lead) // gas) for lead in leads] for n in numbers for _ in range(replicas)
        ]
        micro_batches = [batch(step, m, r) for m in range(gas) for r in range(replicas)]
        of_all = [table for table in tables for _ in range(replicas)]
        losses.append(model.step_of_versions(micro_batches, of_all, versions, weights))
    return losses, model.state()


@pytest.mark.parametrize("gas", [1, 2, 4, 8])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_backpropagation_equals_one_process_with_weights_by_version(stages, gas):
    steps = 20
    results = run_ranks(jobs.train, stages, AHEAD, stages, steps, gas=gas)
    leads = [stages - 1 - s for s in range(stages)]
    tables = [table_of("backprop", stages)] * gas
    compare(results, *reference_run(results[0]["parts"], gas, steps, tables, leads))


ROWS = {
    "chunked": ({"mode": "chunked", "window": 2}, [1, 0, 1, 0]),
    "interlocking": ({"mode": "interlocking", "window": 3}, [2, 2, 1, 0]),
    "overlapping": ({"mode": "overlapping", "window": 2}, [1, 1, 1, 0]),
    "deep supervision": ({"mode": "deep_supervision"}, [3, 2, 1, 0]),
    "at most one": ({"mode": "backprop", "run_ahead": 1}, [1, 1, 1, 0]),
    "slow links": ({"mode": "backprop", "link": {"transfer": 1.0}}, [6, 4, 2, 0]),
}


@pytest.mark.parametrize("gas", [1, 4])
@pytest.mark.parametrize("name", ROWS)
def test_row_equals_one_process_with_weights_by_version(name, gas):
    row, leads = ROWS[name]
    results = run_ranks(jobs.train, 4, AHEAD | row, 4, 8, gas=gas)
    window = {"window": row["window"]} if "window" in row else {}
    tables = [table_of(row["mode"], 4, **window)] * gas
    compare(results, *reference_run(results[0]["parts"], gas, 8, tables, leads))


MIX = {"mix": [{"mode": "backprop", "micro_batches": 3}, {"mode": "local"}], "run_ahead": "auto"}


def test_mix_equals_one_process_with_weights_by_version():
    results = run_ranks(jobs.train, 4, MIX, 4, 8)
    tables = [table_of("backprop", 4)] * 3 + [table_of("local", 4)]
    compare(results, *reference_run(results[0]["parts"], 4, 8, tables, [3, 2, 1, 0]))


def test_replicas_equal_one_process_with_weights_by_version():
    results = run_ranks(jobs.train, 4, AHEAD, 2, 8)
    tables = [table_of("backprop", 2)] * 4
    compare(results, *reference_run(results[0]["parts"], 4, 8, tables, [1, 0], replicas=2))


def test_nothing_ahead_is_1f1b_to_the_bit():
    plain, none = (
        run_ranks(jobs.train, 2, {"mode": "backprop", **ahead}, 2, 4)
        for ahead in ({}, {"run_ahead": 0})
    )
    assert plain[0]["reports"] == none[0]["reports"]
    for a, b in zip(plain, none, strict=True):
        assert all(torch.equal(a["state"][name], b["state"][name]) for name in a["state"])


# --- the same bits, whatever comes between --------------------------------------------------------

SECTIONS = [
    AHEAD,
    AHEAD | {"run_ahead": 2},
    AHEAD | {"mode": "chunked"},
    AHEAD | {"mode": "interlocking"},
    AHEAD | {"mode": "overlapping", "window": 3},
    AHEAD | {"loss_weighting": "token"},
    MIX,
]


@pytest.mark.parametrize("gas", [1, 4])
@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_four_segments_give_the_same_bits_on_1_2_and_4_ranks(section, gas):
    runs = [
        run_ranks(
            jobs.train, ranks, {**section, "segments_per_stage": 4 // ranks}, ranks, 5, gas=gas
        )
        for ranks in (1, 2, 4)
    ]
    same_bits(*runs)


def same_bits(reference, *others):
    """Of runs on any numbers of ranks."""
    whole = {name: tensor for result in reference for name, tensor in result["state"].items()}
    for other in others:
        assert other[0]["reports"] == reference[0]["reports"]
        assert other[0]["eval"] == reference[0]["eval"]
        merged = {name: tensor for result in other for name, tensor in result["state"].items()}
        assert set(merged) == set(whole)
        assert all(torch.equal(merged[name], tensor) for name, tensor in whole.items())
