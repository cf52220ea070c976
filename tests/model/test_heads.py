"""The loss of an auxiliary head, and every option of its make-up on values."""

import pytest
import torch
from families import MIXTRAL
from reference import MODELS
from torch.nn import functional as F

from ds_local.config.files import local_parallel
from ds_local.config.sections import HeadConfig
from ds_local.errors import ConfigError
from ds_local.model import blocks, compiled_loss, families, heads
from ds_local.model.heads import IGNORE, count_targets, linear_cross_entropy, lm_loss
from ds_local.schedules.run_plan import RunPlan

PARTS = [0, 2, 3, 4, 6]  # four segments over the embedding, four blocks and the readout


def make_head(config, segment, seed=3, **options):
    return blocks.make_head(config, segment, seed, HeadConfig(**options), PARTS)


@pytest.fixture(params=sorted(MODELS))
def config(request):
    return families.load_model_config(MODELS[request.param])


def tokens(*shape, seed=0):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def test_lm_loss_predicts_the_next_token():
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
    assert lm_loss(logits, labels).item() == pytest.approx(expected.item())


def test_ignored_labels_do_not_count():
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[1] = IGNORE
    labels[0, 3:] = IGNORE
    expected = F.cross_entropy(logits[0, :2], labels[0, 1:3])
    assert lm_loss(logits, labels).item() == pytest.approx(expected.item())
    assert count_targets(labels).item() == 2
    assert lm_loss(logits, torch.full_like(labels, IGNORE)).item() == 0


def test_the_loss_is_computed_in_float32():
    logits = torch.randn(2, 5, 7).bfloat16()
    assert lm_loss(logits, torch.zeros(2, 5, dtype=torch.long)).dtype == torch.float32


@pytest.mark.parametrize("family", sorted(MODELS))
def test_a_head_is_the_familys_norm_and_a_readout(family):
    config = families.load_model_config(MODELS[family])
    head = make_head(config, 1)
    assert type(head.norm) is type(
        families.skeleton(config).get_submodule(families.family_of(config).norm)
    )
    hidden, labels = torch.randn(2, 6, 32), torch.randint(0, 64, (2, 6))
    assert head(hidden, labels).item() == lm_loss(head.readout(head.norm(hidden)), labels).item()
    assert torch.equal(head.readout.weight, make_head(config, 1).readout.weight)
    assert not torch.equal(head.readout.weight, make_head(config, 2).readout.weight)


@pytest.mark.parametrize("kernel", ["torch", "checkpointed", "compiled"])
def test_sliced_loss_equals_plain_loss_in_value_and_gradients(kernel, monkeypatch):
    monkeypatch.setattr(compiled_loss, "SLICE", 512)
    hidden, weight = (
        torch.randn(1100, 24),
        torch.randn(2000, 24) / 5,
    )  # large enough for slices, and an incomplete last one
    targets = torch.randint(0, 2000, (1100,))
    targets[::7] = IGNORE
    assert hidden.shape[0] * weight.shape[0] > heads._PLAIN_LOGITS
    results = []
    for sliced in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if sliced:
            loss = linear_cross_entropy(h, w, targets, kernel)
        else:
            loss = F.cross_entropy(h @ w.T, targets, ignore_index=IGNORE, reduction="sum")
        loss.backward()
        results.append((loss, h.grad, w.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_sliced_loss_in_bf16_is_near_plain_loss():
    torch.manual_seed(0)
    hidden, weight, targets = (
        torch.randn(1100, 24),
        torch.randn(2000, 24) / 5,
        torch.randint(0, 2000, (1100,)),
    )
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    sliced = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    assert sliced.dtype == torch.float32
    # bf16 keeps 8 bits; over four seeds the two differ by 0.2 to 0.8 %
    assert sliced.item() == pytest.approx(plain.item(), rel=1e-2)


def test_kernels_of_missing_packages_say_what_to_install():
    with pytest.raises(ConfigError, match="pip install"):
        linear_cross_entropy(
            torch.randn(1100, 24),
            torch.randn(2000, 24),
            torch.zeros(1100, dtype=torch.long),
            "liger",
        )


def test_the_readout_computes_the_loss_of_its_logits(config):
    readout = blocks.Readout(config, 0)
    hidden, labels = torch.randn(2, 6, 32), tokens(2, 6)
    assert readout.loss(hidden, labels).item() == pytest.approx(
        lm_loss(readout(hidden), labels).item(), rel=1e-6
    )


def logits_of(head, hidden):
    for block in head.blocks:
        hidden = block(hidden)
    hidden = head.norm(hidden)
    if head.down is not None:
        hidden = head.down(hidden)
    if head.log_temperature is not None:
        hidden = hidden * head.log_temperature.exp()
    return head.rule(head.readout(hidden))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": True},
        {"rank": 8},
        {"blocks": 2},
        {"readout": "shared"},
        {"readout": "shared", "adapter": True},
        {"blocks": 1, "rank": 4, "temperature": True},
    ],
    ids="-".join,
)
def test_a_heads_loss_is_that_of_its_logits(config, options):
    head = make_head(config, 0, **options)
    if head.log_temperature is not None:
        head.log_temperature.data.fill_(0.3)
    hidden, labels = torch.randn(2, 6, 32), tokens(2, 6)
    assert head(hidden, labels).item() == pytest.approx(
        lm_loss(logits_of(head, hidden), labels).item(), rel=1e-5
    )


def test_sampled_token_loss_is_unbiased_in_value_and_gradient(config):
    whole, sampled = make_head(config, 0), make_head(config, 0, token_fraction=0.25)
    hidden, labels = torch.randn(2, 9, 32), tokens(2, 9)
    labels[0, :4] = IGNORE

    def gradient(head):
        given = hidden.clone().requires_grad_()
        loss = head(given, labels)
        loss.backward()
        return loss.item(), given.grad

    loss, exact = gradient(whole)
    torch.manual_seed(0)
    draws = [gradient(sampled) for _ in range(3000)]
    losses = torch.tensor([draw[0] for draw in draws])
    assert losses.mean().item() == pytest.approx(
        loss, abs=4 * losses.std().item() / len(draws) ** 0.5
    )
    assert losses.std() > 0
    mean = torch.stack([draw[1] for draw in draws]).mean(0)
    assert (mean - exact).norm() < 0.1 * exact.norm()
    one = draws[0][1].flatten(0, 1).abs().sum(1) > 0
    assert one.sum() <= 4  # of 16 positions
    sampled.eval()
    assert gradient(sampled)[0] == loss


def test_every_keeps_the_mean_weight_of_auxiliary_losses():
    section = local_parallel({"local_parallel": {"head": {"every": 3}}})
    rows = RunPlan(section, 4, 8).rows_at(0)
    assert sum(count for _, count in rows) == 8
    for loss in range(4):
        total = sum(
            count * routes.loss_weights[loss] for routes, count in rows if loss in routes.weights
        )
        assert total == pytest.approx(8)
    assert [count for routes, count in rows if 0 in routes.weights] == [3]
    assert (
        RunPlan(
            local_parallel({"local_parallel": {"mode": "backprop", "head": {"every": 3}}}), 4, 8
        ).rows_at(0)[0][1]
        == 8
    )


def test_private_blocks_stay_below_what_the_model_has(config):
    assert [len(make_head(config, segment, blocks=2).blocks) for segment in range(3)] == [2, 2, 1]
    assert [len(make_head(config, segment, blocks=[2, 1, 0]).blocks) for segment in range(3)] == [
        2,
        1,
        0,
    ]
    assert (
        len(make_head(config, 0, blocks=2, blocks_from="next_tracked").blocks) == 1
    )  # the next segment has one


def test_private_blocks_can_start_as_the_next_segments(config):
    head = make_head(config, 0, blocks=1, blocks_from="next")
    theirs = blocks.Block(config, 1, 3)
    for own, other in zip(head.blocks.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(own, other)
        assert own.requires_grad
    assert not any(
        p.requires_grad
        for p in make_head(config, 0, blocks=1, blocks_from="next_tracked").blocks.parameters()
    )


def test_a_shared_readout_starts_as_the_last_one_and_takes_no_gradient(config):
    head = make_head(config, 1, readout="shared")
    assert torch.equal(head.readout.weight, blocks.Readout(config, 3).readout.weight)
    head(torch.randn(2, 6, 32), tokens(2, 6)).backward()
    assert head.readout.weight.grad is None
    assert head.norm.weight.grad is not None


@pytest.mark.parametrize("readout", ["shared", "private"])
def test_an_adapter_starts_as_nothing_and_learns(config, readout):
    plain, adapted = (make_head(config, 1, readout=readout, adapter=on) for on in (False, True))
    hidden, labels = torch.randn(2, 6, 32), tokens(2, 6)
    loss = adapted(hidden, labels)
    assert torch.equal(loss, plain(hidden, labels))
    loss.backward()
    # the loss is of readout(adapter(norm(x))): its gradient by the adapter is that by what it
    # gives, times what it takes
    normed = adapted.norm(hidden)[:, :-1].flatten(0, 1).detach()
    given = normed.clone().requires_grad_()
    linear_cross_entropy(given, adapted.readout.weight, labels[:, 1:].flatten()).backward()
    expected = given.grad.T @ normed / (labels[:, 1:] != IGNORE).sum()
    assert torch.allclose(adapted.down.weight.grad, expected, atol=1e-6)
    assert adapted.down.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"rank": 4, "readout": "shared"}, "full width"),
        ({"rank": 4, "adapter": True}, "leave rank out, or adapter"),
        (
            {"vocabulary": 9, "readout": "shared"},
            "a shared readout has all tokens",
        ),
        ({"rare_samples": 4}, "rare_samples is 4, and without vocabulary no token is rare; give"),
        (
            {"vocabulary": 9, "init": "model"},
            "model's readout has all tokens.*add rare_samples",
        ),
        ({"token_fraction": 0}, "greater than 0"),
        ({"token_fracton": 0.5}, "did you mean 'token_fraction'"),
        ({"tracking": 1.0}, "less than 1"),
        ({"tracking": 0.5}, "tracking means nothing with blocks_from 'new'"),
        ({"refresh_every": 5}, "refresh_every is 5, and nothing is copied"),
        ({"blocks_from": "next"}, "blocks_from is 'next' without private blocks"),
    ],
)
def test_heads_that_make_no_sense_are_refused(head, message):
    with pytest.raises(ConfigError, match=message):
        local_parallel({"local_parallel": {"head": head}})


def test_lists_need_an_entry_per_segment():
    for section in (
        {"lr_multipliers": [1, 2]},
        {"clip_multipliers": [1]},
        {"head": {"blocks": [1, 1]}},
    ):
        with pytest.raises(ConfigError, match="4 segments need"):
            local_parallel({"local_parallel": section}).check_lengths(4)


def test_learning_rates_ramp_up_later_in_deeper_segments():
    section = local_parallel(
        {"local_parallel": {"lr_multipliers": [1, 2, 1, 1], "warmup_stagger": 10}}
    )
    assert [section.lr_multiplier(0, 0), section.lr_multiplier(1, 0)] == [1, pytest.approx(2 / 11)]
    assert section.lr_multiplier(1, 10) == 2
    assert section.lr_multiplier(3, 14) == pytest.approx(15 / 31)


def test_the_router_loss_of_private_blocks_is_learned_from_and_not_reported():
    hidden, labels = torch.randn(2, 6, 32), tokens(2, 6)
    found = {}
    for coefficient in (0.0, 4.0):
        mixtral = families.load_model_config(MIXTRAL | {"router_aux_loss_coef": coefficient})
        head = make_head(mixtral, 0, blocks=1).train()
        loss = head(hidden, labels)
        loss.backward()
        gate = next(p for name, p in head.named_parameters() if name.endswith("gate.weight"))
        found[coefficient] = loss.item(), gate.grad
        assert head.eval()(hidden, labels).item() == pytest.approx(loss.item(), rel=1e-6)
    assert found[0.0][0] == found[4.0][0]
    assert (found[4.0][1] - found[0.0][1]).abs().max() > 1e-3
