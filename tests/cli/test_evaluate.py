"""`evaluate`: the loss of one model on a data folder."""

import json

import pytest
import torch
from reference import GPT2
from test_corpus import tokenizer, words  # noqa: F401 - a fixture
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from ds_local.cli.evaluate import evaluate
from ds_local.data.corpus import prepare
from ds_local.data.dataset import TokenData
from ds_local.model.families import load_model_config


@pytest.mark.parametrize("mask", [False, True])
def test_the_loss_is_that_of_what_is_predicted(tmp_path, tokenizer, mask):  # noqa: F811
    """With a document mask each document by itself."""
    lines = [json.dumps({"text": words(2, seed)}) for seed in range(600)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    facts = prepare(
        *([str(tmp_path / "a.jsonl")], tokenizer, 16, tmp_path / "data", 0.2),
        progress=False,
        document_mask=mask,
    )
    config = load_model_config({**GPT2, "vocab_size": facts["vocab_size"]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(tmp_path / "model")
    data = TokenData(tmp_path / "data")
    found = evaluate(tmp_path / "model", data, [0, 3, 5], 2)
    losses = []
    for row in data.sequences("validation", [0, 3, 5]):
        ends = (row == facts["eos_token_id"]).nonzero().flatten() + 1
        for part in row.tensor_split(ends) if mask else [row]:
            if len(part) > 1:
                with torch.no_grad():
                    logits = model(input_ids=part[None]).logits[0, :-1]
                losses.append(F.cross_entropy(logits, part[1:], reduction="none"))
    assert len(losses) > 3 or not mask
    assert found["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert found["sequences"] == 3
