"""Numbers on the command line; options from a file and from a script; --help."""

import pytest
from commands import command
from sentences import assert_one_sentence

import ds_local
from ds_local.cli.arguments import Parser, number, number_or_auto, whole
from ds_local.cli.benchmark import parse_arguments as of_benchmark
from ds_local.cli.simulate import parse_arguments as of_simulate
from ds_local.cli.train import parse_arguments as of_train
from ds_local.errors import ConfigError

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
                ("--seed", "9" * 30),
                ("--max-steps", str(2**63)),
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
                ("--steps", "1000000000"),
            ]
        ),
        *(
            (of_benchmark, ["schedules"], option, value)
            for option, value in [
                ("--repeats", "0"),
                ("--stages", "-1"),
                ("--micro-batches", "0"),
                ("--seconds", "-1"),
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


def test_a_tilde_is_the_home_wherever_a_shell_leaves_it_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = WHOLE.replace("output: o", "output: ~/run").replace("data: d", "data: ~/data")
    found = of_train(
        [*in_file(tmp_path, text)[:1], "~/run.yaml", "--model=~/model", "--max-steps=3"]
    )
    places = [str(tmp_path / name) for name in ("model", "data", "run")]
    assert [found.model, found.data, found.output] == places
    text = Parser()
    text.add_argument("--prompt")
    assert text.parse_args(["--prompt", "~/x is"]).prompt == "~/x is"


@pytest.mark.parametrize("words", [["--output", ""], ["--output="]])
def test_a_name_that_is_empty_is_one_sentence(words, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        of_train([*TRAIN, "--max-steps", "3", *words])
    assert end.value.code == 2
    assert_one_sentence(capsys.readouterr().err.strip(), "--output has the value ''", "--help")


# --- from a file, from a script -------------------------------------------------------------------


def in_file(tmp_path, text, name="run.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return ["--arguments", str(path)]


WHOLE = "model: m\ndata: d\noutput: o\ndeepspeed_config: c\n"


def test_options_of_a_file_are_those_of_the_command_line(tmp_path):
    text = (
        WHOLE
        + "max-steps: 300\nresume: true\nprofile: false\nallow_change: [seed, data]\nseed: null\n"
        + "backprop_micro_batches: auto\n"
    )
    found = of_train(in_file(tmp_path, text))
    words = ["--max-steps", "300", "--resume", "--allow-change", "seed,data"]
    same = of_train([*TRAIN, *words, "--backprop-micro-batches", "auto"])
    assert vars(found) | {"arguments": None} == vars(same)


def test_json_too(tmp_path):
    text = '{"model": "m", "data": "d", "output": "o", "deepspeed_config": "c", "max_steps": 3}'
    assert of_train(in_file(tmp_path, text, "run.json")).max_steps == 3


def test_the_command_line_wins(tmp_path):
    file = in_file(tmp_path, WHOLE + "max_steps: 300\nresume: true\neval_every: 50\n")
    found = of_train([*file, "--eval-every=7", "--no-resume", "--epochs", "0.5"])
    assert (found.eval_every, found.resume) == (7, False)
    assert (found.max_steps, found.epochs) == (None, 0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (WHOLE + "max_step: 3\n", ["'max_step' is not an option", "did you mean 'max_steps'?"]),
        (WHOLE + "max_steps: many\n", ["argument --max-steps", "got 'many'"]),
        (WHOLE + "max_steps: {a: 1}\n", ["max_steps must be a number or text"]),
        (WHOLE + "max_steps: true\n", ["max_steps must be a number or text, got True"]),
        (WHOLE + "max_steps: 3\nresume: 1\n", ["resume must be true or false, got 1"]),
        (WHOLE, ["one of --max-steps and --epochs is required"]),
        (WHOLE + "max_steps: 3\nstop_after_worse: 2\n", ["needs validations; give --eval-every"]),
        ("- max_steps\n", ["must hold options by name"]),
        ("max_steps: [3\n", ["cannot read the arguments in"]),
        ("", ["must hold options by name"]),
        ("max_steps: 3\n", ["the following arguments are required: --model"]),
    ],
)
def test_a_file_with_a_mistake_is_one_sentence(tmp_path, text, words, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        of_train(in_file(tmp_path, text))
    assert end.value.code == 2
    assert_one_sentence(capsys.readouterr().err.strip(), *words, "--help")


def test_a_file_that_is_not_there(capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit):
        of_train(["--arguments", "/nowhere.yaml"])
    assert_one_sentence(capsys.readouterr().err.strip(), "/nowhere.yaml", "--help")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_step": 3}, ["ds_local.train", "did you mean 'max_steps'?"]),
        ({"max_steps": 0}, ["argument --max-steps", "got '0'"]),
        ({}, ["one of --max-steps and --epochs"]),
        ({"max_steps": 3, "epochs": 1}, ["--epochs", "not allowed with"]),
        ({"max_steps": 3, "deepspeed_config": {"optimiser": {}}}, ["'optimizer'"]),
        ({"max_steps": 3, "deepspeed_config": "/nowhere.json"}, ["/nowhere.json"]),
    ],
)
def test_keywords_of_a_script_are_checked_as_the_command_line_is(options, words):
    given = {"model": "m", "data": "d", "output": "o", "deepspeed_config": {}}
    with pytest.raises(ConfigError) as caught:
        ds_local.train(**{**given, **options})
    assert_one_sentence(f"ConfigError: {caught.value}", *words)


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        of_train(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "0: only at the end (default: 0)" in told
    assert "default: None" not in told
    with pytest.raises(SystemExit):
        of_simulate(["--help"])
    assert "show; default 2 --trace" in " ".join(capsys.readouterr().out.split())  # and not twice


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("check --hostfile h --data d", "--data is not looked at with --hostfile"),
        ("check --hostfile h --limit 5", "--limit is not looked at with --hostfile"),
        ("check --ssh-port 2222", "--ssh-port belongs to --hostfile; add that"),
        (
            "prepare --output o --validation-source v --validation-share 0.1",
            "--validation-share holds nothing out beside --validation-source",
        ),
        ("generate r --draft-tokens 2", "--draft-tokens belongs to --assistant"),
        ("study table --seeds 2", "--seeds is for the runs of `run`, not for `table`"),
        ("study methods --minutes 2", "--minutes is for the runs of `run`, not for `methods`"),
        (
            "train --model m --data d --output o --max-steps 1 --deepspeed_config c "
            "--most-starts-per-hour 2",
            "--most-starts-per-hour counts the starts of a unit; give --unit",
        ),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(words, said):
    result = command(*words.split())
    assert result.returncode == 2
    assert_one_sentence(result.stderr.strip(), said, "leave ")
