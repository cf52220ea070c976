"""ds_local.json: malformed, edited or older, it is never believed by accident."""

import json
from pathlib import Path

import pytest
from test_folder import facts, save

from ds_local.checkpoints.facts import (
    FACTS,
    changes_in_words,
    layout_changes,
    read_facts,
    segments_of_stages,
    write_facts,
)
from ds_local.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path):
    save(tmp_path, "one", 7)
    return tmp_path / "one"


def edit(checkpoint, change):
    path = checkpoint / FACTS
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=1))


def test_facts_come_back(checkpoint):
    found = read_facts(checkpoint)
    assert {key: found[key] for key in facts(7)} == facts(7)


@pytest.mark.parametrize("key", [*facts(7), "format", "files", "seal"])
def test_a_missing_key_is_named(checkpoint, key):
    edit(checkpoint, lambda content: content.pop(key))
    with pytest.raises(CheckpointError, match=key):
        read_facts(checkpoint)


@pytest.mark.parametrize("key", [*facts(7), "format", "files", "seal"])
@pytest.mark.parametrize("value", ["x", 3.5, -1, True, None, [], {}, [0, "a"], {"a": 1}])
def test_a_value_of_another_kind_is_refused(checkpoint, key, value):
    if json.loads((checkpoint / FACTS).read_text())[key] == value:
        pytest.skip("that is its value")
    if (key, value) == ("local_parallel", {}):
        pytest.skip("all defaults")
    edit(checkpoint, lambda content: content.update({key: value}))
    with pytest.raises(CheckpointError, match=FACTS):
        read_facts(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 8},
        {"num_stages": 2},
        {"num_replicas": 3},
        {"segment_parts": [0, 1]},
        {"segment_parts": [0, 2, 1]},
        {"segment_parts": [1, 2]},
        {"head_segments": [0]},
        {"segment_stages": [1]},
        {"model": {"n_embd": 8}},
        {"scheduler": "WarmupLR"},
        {"files": {"../../x": [1, "0"]}},
        {"files": {"/etc/passwd": [1, "0"]}},
        {"optimizer": {"type": "sgd", "precision": "fp32", "zero_stage": 0}},
        {"new_key": 1},
    ],
    ids=str,
)
def test_plausible_edits_are_found_too(checkpoint, change):
    edit(checkpoint, lambda content: content.update(change))
    with pytest.raises(CheckpointError, match=FACTS):
        read_facts(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\0", '{"format": 2}', "[" * 100_000])
def test_what_is_no_object_of_ours_is_refused(checkpoint, text):
    (checkpoint / FACTS).write_text(text)
    with pytest.raises(CheckpointError, match=FACTS):
        read_facts(checkpoint)
    (checkpoint / FACTS).write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=FACTS):
        read_facts(checkpoint)


def test_every_flipped_bit_of_the_section_is_found_or_harmless(checkpoint):
    path = checkpoint / FACTS
    text = path.read_bytes()
    wanted = read_facts(checkpoint)
    wanted_files = wanted.pop("files")
    for position in range(0, len(text), 7):
        path.write_bytes(text[:position] + bytes([text[position] ^ 1]) + text[position + 1 :])
        try:
            found = read_facts(checkpoint)
        except CheckpointError:
            continue
        files = found.pop("files")  # a sum that does not fit is found when the file is read
        assert found == wanted
        assert files == wanted_files or files.keys() == wanted_files.keys() or files != wanted_files


@pytest.mark.parametrize(
    "option", ["temperature", "every", "vocabulary", "rare_samples", "companion"]
)
def test_an_option_that_is_newer_than_the_checkpoint_has_its_default(checkpoint, option):
    wanted = read_facts(checkpoint)["local_parallel"]["head"][option]
    path = Path(checkpoint, FACTS)
    content = json.loads(path.read_text())
    del content["local_parallel"]["head"][option], content["seal"]
    path.write_text(write_facts(content))
    assert read_facts(checkpoint)["local_parallel"]["head"][option] == wanted


def test_sections_with_every_kind_of_option_come_back(tmp_path):
    from ds_local.config.schema import LocalParallelConfig

    sections = [
        {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}], "correction": 0.5},
        {"phases": [{"until_step": 4, "mix": [{"mode": "local"}]}, {"mode": "interlocking"}]},
        {"link": {"codec": "int8", "group_size": 4}, "replicas": {"sync": "periodic", "every": 2}},
        {"replicas": {"sync": "subnets", "partition": ["mlp"]}, "lr_multipliers": [1.0]},
        {
            "head": {"blocks": 1, "blocks_from": "next"},
            "mode": "deep_supervision",
            "weights": [1.0],
        },
    ]
    for number, given in enumerate(sections):
        section = LocalParallelConfig.model_validate(given).model_dump(mode="json")
        save(tmp_path, f"t{number}", 1, section=section)
        assert read_facts(tmp_path / f"t{number}")["local_parallel"] == section


def test_the_first_format_is_read(checkpoint):
    def older(content):
        for key in ("optimizer", "scheduler", "seal"):
            del content[key]
        content["format"] = 1

    edit(checkpoint, older)
    found = read_facts(checkpoint)
    assert found["optimizer"] is None
    assert layout_changes(found, {**facts(7), "files": {}}) == {}


def test_layouts_differ_in_words():
    ours = {**facts(7), "files": {}}
    theirs = {**ours, "num_stages": 2, "optimizer": {**ours["optimizer"], "precision": "bf16"}}
    changes = layout_changes(theirs, ours)
    assert changes == {"stages": (2, 1), "precision": ("bf16", "fp32")}
    assert changes_in_words(changes) == "stages 2, now 1, precision bf16, now fp32"
    assert layout_changes(ours, ours) == {}


def test_heads_differ_by_what_their_tensors_depend_on():
    ours = {**facts(7), "files": {}}
    section = ours["local_parallel"]

    def changes(**head):
        theirs = {**ours, "local_parallel": {**section, "head": {**section["head"], **head}}}
        return layout_changes(theirs, ours)

    assert changes(vocabulary=8) == {"head.vocabulary": (8, None)}
    assert changes(vocabulary=8, rare_samples=4) == {}  # a readout of all tokens
    assert changes(companion=0.5) == {"head.companion": (True, False)}
    assert changes(token_fraction=0.5) == {}


def test_which_stage_has_which_segments():
    four = {"segment_parts": [0, 2, 3, 4, 6], "num_stages": 2}
    assert segments_of_stages({**four, "segment_stages": None}) == [[0, 1], [2, 3]]
    assert segments_of_stages({**four, "segment_stages": [0, 1, 1, 0]}) == [[0, 3], [1, 2]]
    ours = {**facts(7), "files": {}, **four}
    dealt = {**ours, "segment_stages": [0, 1, 1, 0]}
    assert layout_changes(dealt, ours) == {"placement": ([0, 1, 1, 0], "in order")}
    assert layout_changes({**ours, "segment_stages": [0, 0, 1, 1]}, ours) == {}
