"""The start check finds what a cut model computes otherwise, and leaves the rest alone."""

import pytest
import torch
from families import VARIANTS
from sentences import one_sentence
from transformers import CONFIG_MAPPING

from ds_local.errors import UnsupportedModel
from ds_local.model import family_check, frames
from ds_local.model.family_check import check_family, fault_of
from ds_local.model.logits import LogitRule
from ds_local.model.routers import Routers


@pytest.fixture(autouse=True)
def afresh():
    family_check._fault_of.cache_clear()
    yield
    family_check._fault_of.cache_clear()


def granite():
    return CONFIG_MAPPING["granite"](
        num_hidden_layers=3, logits_scaling=8.0, embedding_multiplier=12.0, residual_multiplier=0.2
    )


def test_random_numbers_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_family(granite())
    assert torch.equal(torch.rand(2), expected)


def test_a_factor_that_is_left_out_is_found(monkeypatch):
    monkeypatch.setattr(LogitRule, "of", classmethod(lambda cls, config: cls()))
    with pytest.raises(UnsupportedModel, match="logits are not those of its layers"):
        check_family(granite())


def test_a_first_hidden_state_that_is_another_one_is_found(monkeypatch):
    first = frames.Frame.first_hidden
    monkeypatch.setattr(frames.Frame, "first_hidden", lambda self, *args: first(self, *args) / 12.0)
    with pytest.raises(UnsupportedModel, match="logits are not those of its layers"):
        check_family(granite())


def test_masks_that_are_not_passed_on_are_found(monkeypatch):
    calls_of = frames.Frame.calls_of

    def without_masks(self, *args):
        calls = calls_of(self, *args)
        return [call._replace(kwargs=call.kwargs | {"attention_mask": None}) for call in calls]

    monkeypatch.setattr(frames.Frame, "calls_of", without_masks)
    config = CONFIG_MAPPING["mistral"](num_hidden_layers=2, sliding_window=100)
    with pytest.raises(UnsupportedModel, match="logits are not those of its layers"):
        check_family(config)


def test_a_router_loss_that_is_another_one_is_found(monkeypatch):
    config = CONFIG_MAPPING["mixtral"](num_hidden_layers=2)
    check_family(config)
    loss = Routers.loss
    monkeypatch.setattr(Routers, "loss", lambda self, *args: 2 * loss(self, *args))
    family_check._fault_of.cache_clear()
    with pytest.raises(UnsupportedModel, match="its router loss is"):
        check_family(config)


def test_a_model_that_sees_the_future_is_refused(monkeypatch):
    monkeypatch.setattr(family_check, "_close", lambda found, expected: found.shape[1] == 12)
    with one_sentence("its logits depend on later tokens", error=UnsupportedModel):
        check_family(CONFIG_MAPPING["llama"](num_hidden_layers=2))


@pytest.mark.parametrize("vocabulary", [1, 2])
def test_the_smallest_vocabularies_pass(vocabulary):
    check_family(CONFIG_MAPPING["gpt2"](n_layer=1, vocab_size=vocabulary))


@pytest.mark.parametrize("positions", [1, 2, 8])
def test_the_shortest_models_pass(positions):
    check_family(CONFIG_MAPPING["gpt2"](n_layer=1, n_positions=positions))


def test_layers_that_fail_are_refused_and_the_error_is_kept(monkeypatch):
    monkeypatch.setattr(family_check, "layers_of", lambda whole: 1 / 0)
    with pytest.raises(UnsupportedModel, match="fail one by one: division by zero") as error:
        check_family(CONFIG_MAPPING["llama"](num_hidden_layers=2))
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_the_check_is_made_once_for_models_that_shrink_to_the_same(monkeypatch):
    check_family(CONFIG_MAPPING["llama"](num_hidden_layers=2))
    monkeypatch.setattr(family_check, "layers_of", lambda whole: 1 / 0)
    check_family(CONFIG_MAPPING["llama"](num_hidden_layers=5))
    with pytest.raises(UnsupportedModel):
        check_family(CONFIG_MAPPING["llama"](num_hidden_layers=5, attention_bias=True))


def test_every_variant_passes_at_its_own_sizes():
    from transformers import AutoConfig

    for name in ("gpt2", "llama", "gpt_neox"):
        assert fault_of(AutoConfig.for_model(**VARIANTS[name])) is None
