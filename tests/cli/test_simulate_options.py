"""What `simulate` takes, and what would do nothing."""

import pytest
from sentences import assert_one_sentence

from ds_local.cli.simulate_options import check_options, parser_of

TWO = ["--stages", "2", "--micro-batches", "2"]


def parsed(*options):
    parser = parser_of("what it is")
    args = parser.parse_args([*TWO, *options])
    check_options(parser, args)
    return args


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--mode 1f1b --schedule order.csv", "--schedule is of our own modes, but --mode 1f1b"),
        ("--mode gpipe --backprop-micro-batches 1", "--backprop-micro-batches is of our own"),
        ("--mode gpipe --run-ahead --compare local", "--run-ahead is of our own modes"),
        ("--mode zero_bubble --split-backward 1", "--split-backward is of our own modes"),
        ("--mode 1f1b --window 2", "or take one of backprop, "),
        ("--mode 1f1b --transfer 1", "--transfer is of our own modes"),
        ("--mode local --combine mean", "--combine is of --mode overlapping, not of --mode local"),
        ("--mode local --profile p --model m", "--model is not read beside --profile"),
        ("--mode local --profile p --forward 2", "--forward is not read beside --profile"),
        ("--mode local --profile p --link 2", "--link is not read beside --profile"),
        ("--mode local --model m --head 2", "--head is not read beside --model"),
        ("--mode local --seq-len 16", "--seq-len belongs to --model; add that"),
        ("--mode local --deepspeed_config c", "--deepspeed_config belongs to --model"),
        ("--mode local --steps 3", "--steps is of the pictures that --html and --png draw"),
    ],
)
def test_what_would_do_nothing_is_refused(options, said, capsys):
    with pytest.raises(SystemExit):
        parsed(*options.split())
    assert_one_sentence(capsys.readouterr().err.strip(), said)


@pytest.mark.parametrize(
    "options",
    [
        "--mode 1f1b --compare local --transfer 1 --head 1",
        "--mode overlapping --combine mean",
        "--mode local --model m --seq-len 16 --deepspeed_config c --link 2",
        "--mode local --backprop-micro-batches 1 --split-backward 2 --window 2",
        "--mode local --profile p --link-depth 2",
        "--mode local --html a.html --steps 3",
    ],
)
def test_what_does_something_is_taken(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parsed(*options.split()).stages == 2
