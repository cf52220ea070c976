"""scripts/check_cluster.py on two ranks."""

import json
from pathlib import Path

import pytest
from launch import finished, start, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Sequences of 16 tokens for a model that takes many more."""
    inputs = write_inputs(tmp_path_factory.mktemp("inputs"))
    model = Path(inputs["--model"])
    sizes = json.loads(model.read_text())
    model.write_text(json.dumps({**sizes, "n_positions": 4096}))
    return inputs


def check(inputs, *names, **other):
    """Both ranks; (status, what they said)."""
    words = [word for name in names for word in (name, inputs[name])]
    words += [word for name, value in other.items() for word in (f"--{name}", str(value))]
    done = finished(start("check_cluster.py", *words, ranks=2), 120)
    return done.returncode, done.stdout


def test_memory_is_that_of_the_sequences_of_the_data(inputs):
    gib = []
    for names, length in (
        (["--data"], "for sequences of 16 tokens\n"),
        ([], "for sequences of 4,096 tokens, the model's longest (--data says how long"),
    ):
        status, said = check(inputs, "--deepspeed_config", "--model", *names)
        assert status == 0, said
        assert length in said
        assert "2 ranks, 1 edges: ready" in said
        gib.append(float(said.partition("memory: about ")[2].split()[0]))
    assert gib[0] < gib[1]


def test_what_a_rank_cannot_read_is_said_at_once(inputs):
    given = "--deepspeed_config", "--model"
    for other, said in (
        ({"data": "/nowhere/data"}, "/nowhere/data is no prepared data folder (No such file"),
        ({"num-stages": 3}, "cannot be divided into 3 stages"),
    ):
        status, output = check(inputs, *given, **other, limit=100)
        assert status != 0
        assert said in output, output
        assert "Traceback" not in output
        assert "did not come" not in output
