"""Exported folders and what is done with them: where they may go, what they must hold, whose data
they are evaluated on."""

from __future__ import annotations

import json
import math
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VARIANTS
from ranks import run_ranks
from sentences import one_sentence
from small_disks import small_disk
from test_corpus import words
from test_hf import train_and_save
from transformers import AutoModelForCausalLM, AutoTokenizer
from written import tree

from ds_local import outputs
from ds_local.checkpoints import hf_export as hf
from ds_local.checkpoints.source import find_checkpoint
from ds_local.cli import evaluate, generate
from ds_local.data.corpus import prepare
from ds_local.data.dataset import TokenData
from ds_local.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DsLocalError,
    ExportError,
    WeightsError,
)
from ds_local.outputs.storage import size_of

VOCABULARY = 400
TEXTS = ["def f(x):\n    return  x", "  two spaces", "héllo ☃", words(50, 3), " x\n\n"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, other data of the same size, the same text prepared once more, and a run
    of a qwen2 model, for which transformers takes Qwen's own tokenizer whatever is written."""
    place = tmp_path_factory.mktemp("made")
    for name, texts in (("data", [0]), ("other", [1]), ("held-out", [0, 2])):
        source = place / f"{name}.txt"
        source.write_text(
            "\n".join(words(40, 100 * text + line) for text in texts for line in range(90))
        )
        tokenizer = (
            f"sentencepiece:{VOCABULARY}"
            if name != "held-out"
            else str(place / "data" / "tokenizer")
        )
        prepare([str(source)], tokenizer, 16, place / name, progress=False)
    model = VARIANTS["qwen2"] | {"vocab_size": VOCABULARY}
    run_ranks(
        train_and_save,
        1,
        model,
        {"segments_per_stage": 2, "head": {"rank": 8}},
        1,
        str(place / "run" / "checkpoints"),
    )
    shutil.copytree(place / "data" / "tokenizer", place / "run" / "checkpoints" / "tokenizer")
    facts = {
        "data": {"folder": str(place / "data"), **TokenData(place / "data").facts},
        "config": {},
        "versions": {"torch": "2"},
    }
    (place / "run" / "run.json").write_text(json.dumps(facts))
    hf.export_all(place / "run", place / "exits")
    return place


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run to damage."""
    return shutil.copytree(made / "run", tmp_path / "run")


# --- the tokenizer


def test_the_exported_tokenizer_gives_the_datas_ids(made: Path) -> None:
    original = AutoTokenizer.from_pretrained(made / "data" / "tokenizer")
    for segment in (0, 1):
        loaded = AutoTokenizer.from_pretrained(made / "exits" / f"segment_{segment}")
        for text in TEXTS:
            assert loaded(text)["input_ids"] == original(text)["input_ids"]
            assert loaded.decode(loaded(text)["input_ids"]) == text
        assert (
            json.loads((made / "exits" / f"segment_{segment}" / "config.json").read_text())[
                "model_type"
            ]
            == "qwen2"
        )


TOKENIZERS = {
    "another one": (
        lambda p, made: shutil.copytree(made / "other" / "tokenizer", p, dirs_exist_ok=True),
        "is not the tokenizer",
    ),
    "none": (lambda p, made: None, "tokenizer is missing"),
    "half of one": (
        lambda p, made: p.mkdir() or (p / "tokenizer_config.json").write_text("{"),
        "cannot load the tokenizer",
    ),
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_a_run_whose_tokenizer_was_exchanged(
    made: Path, run: Path, tmp_path: Path, what: str
) -> None:
    build, said = TOKENIZERS[what]
    shutil.rmtree(run / "checkpoints" / "tokenizer")
    build(run / "checkpoints" / "tokenizer", made)
    with one_sentence(str(run), said, error=ExportError):
        hf.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- runs that were damaged or edited


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


RUNS = {
    "half a run.json": (lambda p: (p / "run.json").write_text("{"), "run.json is damaged"),
    "no text": (lambda p: (p / "run.json").write_bytes(b"\xff\xfe"), "run.json is damaged"),
    "a list": (lambda p: (p / "run.json").write_text("[]"), "run.json is damaged"),
    "data of a kind": (
        lambda p: edited(p / "run.json", data=[3]),
        "run.json is damaged",
    ),
    "data without keys": (
        lambda p: edited(p / "run.json", data={"tokens": 3}),
        "run.json or metrics.jsonl is not",
    ),
    "versions of a kind": (
        lambda p: edited(p / "run.json", versions=3),
        "run.json is damaged",
    ),
    "config of a kind": (
        lambda p: edited(p / "run.json", config=[1]),
        "run.json is damaged",
    ),
    "no checkpoints": (lambda p: shutil.rmtree(p / "checkpoints"), "nothing to resume in"),
    "another folder": (lambda p: shutil.rmtree(p) or p.mkdir(), "nothing to resume in"),
}


@pytest.mark.parametrize("what", RUNS)
def test_runs_that_were_damaged(run: Path, tmp_path: Path, what: str) -> None:
    build, said = RUNS[what]
    build(run)
    with one_sentence(str(run), said, error=DsLocalError):
        hf.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_lines_of_metrics_do_no_harm(run: Path, tmp_path: Path) -> None:
    good = {"step": 2, "segment": 1, "stage": 1, "split": "validation", "loss": 2.5}
    good |= {"tokens": 64, "seconds": 1.0}
    lines = ["{", '{"a": 3}', json.dumps(good), '"x"']
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "2.5000" in (hf.export(run, tmp_path / "out") / "README.md").read_text()


def test_weights_that_are_not_finite_are_not_exported(run: Path, tmp_path: Path) -> None:
    from ds_local.checkpoints.sums import _checksum

    checkpoint = find_checkpoint(run)
    layer = checkpoint / "layer_02-model_states.pt"
    state = torch.load(layer, weights_only=True)
    name = next(iter(state))
    state[name].view(-1)[3] = math.inf
    torch.save(state, layer)
    facts = json.loads((checkpoint / "ds_local.json").read_text())
    facts["files"][layer.name] = _checksum(layer)
    (checkpoint / "ds_local.json").write_text(json.dumps(facts))
    with one_sentence(str(layer), f"tensor {name} holds NaN or infinity", error=ExportError):
        hf.export(run, tmp_path / "out")


# --- where to


PLACES = {
    "a folder": lambda p: p.mkdir() or (p / "thesis.tex").write_text("x"),
    "a model": lambda p: p.mkdir() or (p / "config.json").write_text("{}"),
    "a copy of the card": lambda p: (
        p.mkdir() or (p / "README.md").write_text("Trained with ds_local for 3 optimizer steps")
    ),
    "a file": lambda p: p.write_text("x"),
    "a link": lambda p: p.symlink_to("/usr"),
    "a file beside ours": lambda p: (
        hf.export(p.parent / "run", p) and (p / "notes.md").write_text("x")
    ),
    "trained on": lambda p: hf.export(p.parent / "run", p) and retrained(p),
    "a card that was edited": lambda p: (
        hf.export(p.parent / "run", p) and (p / "README.md").open("a").write("mine")
    ),
    "data": lambda p: prepare(
        [str(p.parent / "a.txt")],
        str(p.parent / "run/checkpoints/tokenizer"),
        16,
        p,
        progress=False,
    ),
}


def retrained(folder: Path) -> None:
    """As a user who goes on training in the folder does."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(folder)


@pytest.mark.parametrize("what", PLACES)
def test_an_output_that_is_not_ours_is_left_alone(run: Path, tmp_path: Path, what: str) -> None:
    (tmp_path / "a.txt").write_text(words(300))
    PLACES[what](tmp_path / "out")
    before = tree(tmp_path)
    for export in (hf.export, hf.export_all):
        with one_sentence(f"{tmp_path}/out", "is left alone", error=ExportError):
            export(run, tmp_path / "out")
    assert tree(tmp_path) == before


def test_an_export_replaces_an_export(run: Path, tmp_path: Path) -> None:
    for place in (run, run / "checkpoints", find_checkpoint(run)):
        with one_sentence(str(place), "is left alone"):
            hf.export(run, place)
    hf.export(run, tmp_path / "out", segment=0)
    hf.export(run, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4
    hf.export_all(run, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        outputs.FILES,
        "segment_0",
        "segment_1",
    ]
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_while_exporting(run: Path, tmp_path: Path) -> None:
    """Whatever is written when it is full: weights, config, tokenizer, card, list of files."""
    whole = size_of(hf.export(run, tmp_path / "whole")) // 1024
    with small_disk(tmp_path / "disk", f"size={whole * 3 // 2}k") as disk:
        hf.export(run, disk / "out")
        before = tree(disk)
        for place in ("out", "new"):
            with one_sentence(
                f"cannot write {disk}/{place}", "no space left", "bytes free", error=ExportError
            ):
                hf.export(run, disk / place)
        assert tree(disk) == before
    for size in (8, whole // 2, *range(whole - 60, whole, 12)):
        with small_disk(tmp_path / f"disk-{size}", f"size={size}k") as disk:
            with one_sentence(f"cannot write {disk}/out", "no space left", error=ExportError):
                hf.export(run, disk / "out")
            assert tree(disk) == {}


# --- evaluating


def evaluated(model: Path, data: Path, **how: Any) -> dict[int, dict[str, Any]]:
    settings = {"sequences": None, "batch_size": 8, "allow_other_data": False, "json": None}
    return evaluate.evaluate_all(Namespace(model=str(model), data=str(data), **settings | how))


def test_the_runs_own_data_and_other_data(made: Path, tmp_path: Path) -> None:
    own = evaluated(made / "run", made / "data")
    assert {row["data"] for row in own.values()} == {
        "what the model was trained on, its validation split"
    }
    assert [row["loss"] for row in own.values()] == [
        row["loss"] for row in evaluated(made / "exits", made / "data").values()
    ]
    for data, said in (
        ("other", "made with another tokenizer than the model's: it gives"),
        ("held-out", "(fingerprint "),
    ):
        for model in ("run", "exits"):
            with one_sentence(str(made / data), said, "--allow-other-data", error=DataError):
                evaluated(made / model, made / data)
        told = evaluated(made / "exits", made / data, allow_other_data=True)[0]["data"]
        assert said in told
        assert "other than the model was trained on" in told


def test_models_that_do_not_say_what_they_were_trained_on(made: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(made / "exits" / "segment_1", tmp_path / "plain")
    assert (
        evaluated(plain, made / "held-out")[0]["data"]
        == "not known to be what the model was trained on"
    )
    with one_sentence("made with another tokenizer"):
        evaluated(plain, made / "other")


def test_some_sequences_stand_for_all(made: Path) -> None:
    count = TokenData(made / "data").num_sequences("validation")
    whole = evaluated(made / "exits", made / "data")[1]
    assert whole["sequences"] == count
    assert evaluated(made / "exits", made / "data", sequences=count, batch_size=3)[1][
        "loss"
    ] == pytest.approx(whole["loss"])
    assert evaluated(made / "exits", made / "data", sequences=10**9)[1] == whole
    assert evaluated(made / "exits", made / "data", sequences=2)[1]["sequences"] == 2


@pytest.mark.parametrize(
    ("how", "said", "error"),
    [
        ({"sequences": 0}, "0 validation sequences", DataError),
        ({"sequences": -3}, "-3 validation sequences", DataError),
        ({"data": "run"}, "run is not a complete data folder", DataError),
        ({"data": "nowhere"}, "nowhere is not a complete data folder", DataError),
        ({"model": "nowhere"}, "nowhere does not exist", WeightsError),
        ({"model": "data"}, "nothing to resume in", CheckpointError),
        ({"model": "data/tokenizer"}, "nothing to resume in", CheckpointError),
    ],
    ids=str,
)
def test_what_cannot_be_evaluated(
    made: Path, how: dict[str, Any], said: str, error: type[DsLocalError]
) -> None:
    settings = {"model": "exits", "data": "data"} | how
    for key in ("model", "data"):
        settings[key] = made / settings[key]
    with one_sentence(said, error=error):
        evaluated(**settings)


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--json", "data/prepared.json", "was not written by this command"),
        ("--json", "data", "is a folder"),
        ("--batch-size", "0", "must be an integer of at least 1"),
        ("--sequences", "many", "must be an integer of at least 1"),
    ],
)
def test_bad_arguments_of_evaluate(
    made: Path, capsys: Any, flag: str, value: str, said: str
) -> None:
    given = str(made / value) if flag == "--json" else value
    before = tree(made / "data")
    with pytest.raises(SystemExit):
        evaluate.main([str(made / "exits"), "--data", str(made / "data"), flag, given])
    told = capsys.readouterr().err
    assert flag in told
    assert said in told
    assert told.count("\n") == 1
    assert tree(made / "data") == before


def test_a_model_too_small_for_the_data(made: Path, tmp_path: Path) -> None:
    for change in ({"vocab_size": VOCABULARY - 1}, {"max_position_embeddings": 15}):
        config = hf.families.load_model_config(
            VARIANTS["gpt2"] | {"vocab_size": VOCABULARY, **change}
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
        with one_sentence(f"{tmp_path}/small takes at most", error=DataError):
            evaluated(tmp_path / "small", made / "data")


def test_figures_go_to_a_file_of_ours(made: Path, tmp_path: Path) -> None:
    for _ in range(2):
        found = evaluated(made / "exits", made / "data", json=tmp_path / "figures.json")
        assert json.loads((tmp_path / "figures.json").read_text())["1"]["loss"] == found[1]["loss"]
    assert os.listdir(tmp_path) == ["figures.json"]


# --- generating


def continued(model: Path, **how: Any) -> str:
    settings = {
        "prompt": "abc",
        "temperature": 0.0,
        "max_new_tokens": 3,
        "draft_tokens": 4,
        "seed": 0,
    }
    return generate.continue_text(model, None, Namespace(**settings | how))


def test_prompts_that_do_not_fit(made: Path, tmp_path: Path) -> None:
    model = made / "exits" / "segment_1"
    assert continued(model).startswith("abc")
    for prompt, said in (("", "--prompt has 0 tokens; "), ("x " * 50, "takes from 1 to 15")):
        with one_sentence(said, error=ConfigError):
            continued(model, prompt=prompt)
    small = hf.families.load_model_config(VARIANTS["gpt2"])  # of fewer tokens than its tokenizer
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(made / "data" / "tokenizer").save_pretrained(tmp_path / "small")
    with one_sentence(f"{tmp_path}/small gives the id", "the model has 64 tokens"):
        continued(tmp_path / "small")


@pytest.mark.parametrize("flag", ["--temperature", "--max-new-tokens", "--draft-tokens"])
@pytest.mark.parametrize("value", ["nan", "-1"])
def test_bad_numbers_of_generate(made: Path, capsys: Any, flag: str, value: str) -> None:
    with pytest.raises(SystemExit):
        generate.main([str(made / "exits"), flag, value])
    assert flag in capsys.readouterr().err
