"""What a run is given, checked against each other, and what run.json says of it."""

import json

import pytest
from jobs import ds_config
from reference import GPT2
from sentences import assert_one_sentence
from test_corpus import tokenizer, words  # noqa: F401 - a fixture

from ds_local.cli.train import parse_arguments
from ds_local.data.corpus import prepare
from ds_local.errors import ConfigError, UnsupportedModel
from ds_local.model import document_mask
from ds_local.training.banner import Length
from ds_local.training.inputs import VOCABULARY_PADDING, facts_of_start, length_from, read_inputs


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):  # noqa: F811
    place = tmp_path_factory.mktemp("data")
    (place / "a.txt").write_text(words(4000))
    prepare([str(place / "a.txt")], tokenizer, 16, place / "data", progress=False)
    return place / "data"


def arguments(folder, data, *more, **model):
    """A command line of train.py, with a model of the data's vocabulary and length."""
    facts = json.loads((data / "prepared.json").read_text())
    fits = {"vocab_size": facts["vocab_size"], "n_positions": facts["seq_len"]}
    (folder / "model.json").write_text(json.dumps({**GPT2, **fits, **model}))
    (folder / "ds_config.json").write_text(json.dumps(ds_config({"mode": "local"})))
    return parse_arguments(
        [
            *("--model", str(folder / "model.json"), "--data", str(data), "--max-steps", "1"),
            *("--output", str(folder / "run"), "--deepspeed_config"),
            *(str(folder / "ds_config.json"), *more),
        ]
    )


def test_what_fits_is_read(tmp_path, data):
    config, found, model = read_inputs(arguments(tmp_path, data, "--mode", "backprop"))
    assert config["local_parallel"]["mode"] == "backprop"
    assert (found.folder, found.seq_len, model.n_layer) == (data, 16, 4)
    assert model.eos_token_id == found.facts["eos_token_id"] != GPT2["eos_token_id"]


def test_a_vocabulary_may_be_rounded_up_a_little(tmp_path, data):
    own = json.loads((data / "prepared.json").read_text())["vocab_size"]
    most = own + VOCABULARY_PADDING - 1
    assert read_inputs(arguments(tmp_path, data, vocab_size=most))[2].vocab_size == most
    for wrong in (own - 1, most + 1):
        with pytest.raises(ConfigError) as error:
            read_inputs(arguments(tmp_path, data, vocab_size=wrong))
        assert_one_sentence(error.value, f"vocab_size {wrong}", f"set vocab_size to {own}")


def test_sequences_must_fit_the_model(tmp_path, data):
    with pytest.raises(ConfigError) as error:
        read_inputs(arguments(tmp_path, data, n_positions=8))
    assert_one_sentence(error.value, "sequences of 16 tokens", "at most 8", "a smaller --seq-len")


def test_a_model_must_keep_documents_apart_where_the_data_asks_for_it(tmp_path, data, monkeypatch):
    facts = json.loads((data / "prepared.json").read_text())
    tokens = str(data / "tokenizer")
    (tmp_path / "a.txt").write_text(words(4000))
    prepare([str(tmp_path / "a.txt")], tokens, 16, tmp_path / "data", document_mask=True)
    assert read_inputs(arguments(tmp_path, tmp_path / "data"))[1].facts["document_mask"]
    monkeypatch.setattr(document_mask, "_taken", lambda *_: {"attention_mask": None})
    with pytest.raises(UnsupportedModel) as error:
        read_inputs(arguments(tmp_path, tmp_path / "data"))
    assert_one_sentence(error.value, "block 0 of gpt2", "without --document-mask")
    assert not facts["document_mask"]
    read_inputs(arguments(tmp_path, data))


def test_a_start_is_told_before_there_is_an_engine(tmp_path, data):
    args = arguments(tmp_path, data)
    config, found, model = read_inputs(args)
    facts = facts_of_start(args, {"max_steps": 1}, config, model, found, 3)
    assert facts["arguments"] == {"max_steps": 1}
    assert facts["layout"] == {"replicas": 3}
    assert facts["data"]["folder"] == str(data)
    assert facts["data"]["seq_len"] == 16
    assert facts["weights"] is None  # a config file has none
    assert {"ds_local", "torch", "deepspeed", "python"} <= facts["versions"].keys()
    json.dumps(facts)


def test_epochs_count_what_earlier_steps_have_seen():
    halved = length_from(Length(200, 4, 16, 800), 1.0, step=50, seen=400)
    assert (halved.steps, halved.more) == (150, 200)  # 400 sequences are left, of 4 a step
    assert str(halved) == "150 of 4 x 16 tokens: 12,800 tokens, 1 epochs of 800 sequences"
    doubled = length_from(Length(50, 16, 16, 800), 1.0, step=50, seen=400)
    assert doubled.steps == 75
    assert length_from(Length(100, 8, 16, 800), 1.0, step=50, seen=400) == Length(100, 8, 16, 800)
    assert length_from(Length(60, 16, 16, 800), None, step=50, seen=400).steps == 60
