"""The figures on a model card are those of the run, up to the checkpoint's step."""

import math

from ds_local.checkpoints.model_card import model_card

CHECKPOINT = {
    "model": {"model_type": "gpt2"},
    "step": 1200,
    "segment_parts": [0, 3, 6],
    "num_stages": 2,
    "num_replicas": 1,
    "local_parallel": {"mode": "local"},
}


def row(step, segment, loss, split="validation"):
    return {"split": split, "step": step, "segment": segment, "loss": loss}


METRICS = [
    row(600, 0, 3.0),
    row(1200, 0, 2.0),
    row(1200, 1, math.log(5)),
    row(1200, 1, 0.1, "train"),
    row(1800, 1, 0.5),  # the run went on
    row(1200, 0, None),
]


def test_the_last_validation_of_every_exit_that_the_checkpoint_has_seen():
    card = model_card(CHECKPOINT, {}, METRICS, 1, num_blocks=4, num_parameters=12345)
    assert "# gpt2, 4 blocks, 12,345 parameters" in card
    assert "for 1,200 optimizer steps. It is the full model, trained as 2 segments." in card
    assert "| 0 | 1200 | 2.0000 | 7.39 |" in card
    assert "| **1 (this model)** | 1200 | 1.6094 | 5.00 |" in card
    assert "0.5000" not in card
    assert "3.0000" not in card
    assert "## Data" not in card


def test_a_loss_that_went_out_of_bounds_is_told():
    card = model_card(CHECKPOINT, {}, [row(1200, 1, 1234.5)], 1, num_blocks=4, num_parameters=1)
    assert "| **1 (this model)** | 1200 | 1234.5000 |" in card


def test_exits_that_are_no_more_are_left_out():
    metrics = [row(600, 3, 2.5), *METRICS]  # of four segments, before
    card = model_card(CHECKPOINT, {}, metrics, 1, num_blocks=4, num_parameters=12345)
    assert "2.5000" not in card


def test_a_run_that_has_diverged_has_a_card():
    assert "| 800.0000 |" in model_card(CHECKPOINT, {}, [row(1200, 1, 800.0)], 1, 4, 1)


def test_losses_over_a_part_of_the_vocabulary_are_told():
    told = "Exits before the last tell 8 tokens apart"
    assert told not in model_card(CHECKPOINT, {}, METRICS, 1, 4, 1)
    some = {**CHECKPOINT, "local_parallel": {"head": {"vocabulary": 8}}}
    assert told in model_card(some, {}, METRICS, 1, 4, 1)
    whole = {**CHECKPOINT, "local_parallel": {"head": {"vocabulary": 8, "rare_samples": 4}}}
    assert told not in model_card(whole, {}, METRICS, 1, 4, 1)


def test_an_early_exit_says_which_blocks_it_has():
    card = model_card(CHECKPOINT, {}, [], 0, num_blocks=3, num_parameters=1)
    assert "It is the first 2 blocks (up to segment 0 of 2) of a larger model" in card
    assert "whose 1 private blocks follow as the last ones" in card
    assert "## Losses" not in card


def test_where_the_data_lay_stays_private():
    data = {
        "sources": ["/home/somebody/text.txt", "hub:org/name"],
        "tokenizer": "/home/somebody/tokenizer",
        "vocab_size": 4096,
        "tokens": 10**6,
        "seq_len": 128,
        "fingerprint": "f00",
    }
    card = model_card(CHECKPOINT, {"data": data}, [], 1, 4, 1)
    assert "- sources: text.txt, hub:org/name" in card
    assert "- tokenizer: tokenizer, 4,096 tokens" in card
    assert "somebody" not in card
