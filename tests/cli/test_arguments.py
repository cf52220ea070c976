"""Numbers on the command line."""

import pytest
from sentences import assert_one_sentence

from ds_local.cli.arguments import number, number_or_auto, whole
from ds_local.cli.simulate import parse_arguments as of_simulate
from ds_local.cli.train import parse_arguments as of_train

TRAIN = ["--model", "m", "--data", "d", "--output", "o", "--deepspeed_config", "c"]
SIMULATE = ["--stages", "2", "--micro-batches", "4", "--mode", "local"]


@pytest.mark.parametrize(
    ("parse", "given", "option", "value"),
    [
        *(
            (of_train, TRAIN, option, value)
            for option, value in [
                ("--max-steps", "-5"),
                ("--max-steps", "0"),
                ("--max-steps", "1e3"),
                ("--max-steps", "many"),
                ("--eval-every", "-1"),
                ("--eval-sequences", "0"),
                ("--save-every", "-1"),
                ("--num-stages", "0"),
                ("--segments-per-stage", "-2"),
                ("--window", "0"),
                ("--window", "1.5"),
                ("--backprop-micro-batches", "-1"),
                ("--backprop-micro-batches", "some"),
                ("--backprop-from", "0"),
                ("--seed", "-1"),
            ]
        ),
        *(
            (of_simulate, SIMULATE, option, value)
            for option, value in [
                ("--stages", "0"),
                ("--micro-batches", "-4"),
                ("--forward", "-1"),
                ("--forward", "nan"),
                ("--link", "inf"),
                ("--transfer", "slow"),
                ("--link-depth", "0"),
                ("--seq-len", "-8"),
            ]
        ),
    ],
)
def test_a_bad_number_is_one_sentence(parse, given, option, value, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        parse(
            [*given, "--max-steps", "3", option, value]
            if parse is of_train
            else [*given, option, value]
        )
    assert end.value.code == 2
    said = capsys.readouterr().err.strip()
    assert_one_sentence(said, f"argument {option}", f"got {value!r}", "--help")


def test_of_several_ranks_the_first_one_speaks(capsys, monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        of_train([*TRAIN, "--max-steps", "-5"])
    assert capsys.readouterr().err == ""
    assert waited == [5]


def test_good_numbers():
    assert (whole(1)("7"), number()("0"), number_or_auto("auto"), number_or_auto("0")) == (
        7,
        0.0,
        "auto",
        0,
    )
    assert number(above=True)("1e-6") == 1e-6
