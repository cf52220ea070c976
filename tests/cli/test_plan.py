"""`plan`: what it says of a small cluster."""

import json

import pytest
from sentences import assert_one_sentence

from ds_local.cli.plan import as_json, main, parse_arguments
from ds_local.cluster.candidates import GIB, TAILS, Candidate
from ds_local.cluster.job import CONFIG, START
from ds_local.cluster.prices import Price
from ds_local.errors import OutputError

BEST = Price(
    Candidate(2, 1, "local", "full", 4, 8), 2.0, 1000, 3 * GIB, {"auxiliary heads": 0.5}, 4e9, 5e9
)

ARGUMENTS = [
    *(
        "--model",
        "gpt2-nano.json",
        "--nodes",
        "1",
        "--devices-per-node",
        "2",
        "--device-tflops",
        "1",
    ),
    *("--memory-gib", "8", "--link-gbps", "1", "--intra-gbps", "10"),
]


def test_figures_for_programs():
    found = as_json(BEST)
    assert (found["tokens_per_second"], found["candidate"]["scheme"]) == (500.0, "local")
    assert found["loss"] == "75% of the step is waiting for other stages or links"


def test_a_whole_plan(capsys):
    schemes = ["--schemes", "local", "backprop", "--heads", "full", "--batch-tokens", "4096"]
    for more, needed in (["--tokens-only"], {1.0}), ([], {1.0, 1.1048}):
        assert main([*ARGUMENTS, *schemes, *more, "--json", "-"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert {one["candidate"]["scheme"] for one in found["best"]} == {"local", "backprop"}
        assert {one["learning"]["tokens"] for one in found["best"]} == needed
        worth = [one["tokens_per_second"] / one["learning"]["tokens"] for one in found["best"]]
        assert worth == sorted(worth, reverse=True)


def test_the_winner_is_written_ready_to_start(tmp_path, capsys):
    folder = tmp_path / "plan"
    schemes = [
        "--schemes",
        "local",
        "--heads",
        "full",
        "--batch-tokens",
        "4096",
        "--tokens",
        "40960",
    ]
    assert main([*ARGUMENTS, *schemes, "--write", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"bash {folder}/{START}" in said
    assert "1.10*  local: local on 2 segments (vocabulary / width 8, 1 seed)" in said
    config = json.loads((folder / CONFIG).read_text())
    assert config["scheduler"]["params"]["total_num_steps"] == 12  # 10 x 1.1048, rounded up
    assert config["local_parallel"]["mode"] == "local"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(OutputError, match="mine"):
        main([*ARGUMENTS, *schemes, "--write", str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_tail_is_written_where_its_first_step_is_known(tmp_path, capsys):
    tail, folder = "local, tail 40 %", tmp_path / "plan"
    asked = [*ARGUMENTS, "--write", str(folder), "--batch-tokens", "4096"]
    assert not set(parse_arguments(asked).schemes) & set(TAILS)
    with pytest.raises(SystemExit):
        parse_arguments([*asked, "--schemes", tail])
    assert f"'{tail}' changes the scheme late in the run" in capsys.readouterr().err
    assert tail in parse_arguments([*asked, "--tokens", "40960"]).schemes
    assert main([*asked, "--schemes", tail, "--heads", "full", "--tokens", "40960"]) == 0
    config = json.loads((folder / CONFIG).read_text())
    steps = config["scheduler"]["params"]["total_num_steps"]
    assert config["local_parallel"]["phases"][0]["until_step"] == round(0.6 * steps)


@pytest.mark.parametrize("option", ["--nodes", "--device-tflops"])
def test_numbers_must_be_positive(option, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([*ARGUMENTS, option, "0"])
    assert option in capsys.readouterr().err


def test_scaling_tables_and_their_picture(tmp_path, capsys):
    size = ["--model", "gpt2-nano.json", "--nodes", "2", "--devices-per-node", "4"]
    rates = ["--device-tflops", "1", "--memory-gib", "8", "--link-gbps", "10"]
    wanted = ["--intra-gbps", "100", "--batch-tokens", "8192", "--schemes", "local"]
    files = ["--svg", str(tmp_path / "s.svg"), "--json", str(tmp_path / "s.json")]
    assert main([*size, *rates, *wanted, "--scaling", "growing", *files]) == 0
    said = capsys.readouterr().out
    assert "local: tokens per second of a device" in said
    assert "1024" in said
    found = json.loads((tmp_path / "s.json").read_text())
    assert {cell["scheme"] for cell in found} == {"data parallel", "local"}
    prices = [cell["price"] for cell in found if cell["price"]]
    for price in prices:
        devices = price["candidate"]["stages"] * price["candidate"]["replicas"]
        each = price["tokens_per_second"] / devices
        assert price["device_tokens_per_second"] == pytest.approx(each)
    assert (tmp_path / "s.svg").read_text().startswith("<svg")
    other = ["--svg", str(tmp_path / "other.svg"), "--json", "-"]
    assert main([*size, *rates, *wanted, "--scaling", "growing", *other]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(found)
    assert (tmp_path / "other.svg").read_text() == (tmp_path / "s.svg").read_text()


def test_figures_for_programs_and_the_winner_as_files(tmp_path, capsys):
    folder, schemes = tmp_path / "plan", ["--schemes", "local", "--batch-tokens", "4096"]
    assert main([*ARGUMENTS, *schemes, "--json", "-", "--write", str(folder)]) == 0
    said, aside = capsys.readouterr()
    assert json.loads(said)["best"]
    assert f"bash {folder}/{START}" in aside
    assert (folder / CONFIG).exists()
    assert (folder / START).exists()


def test_where_nothing_fits_there_is_no_winner(tmp_path, capsys):
    folder, schemes = tmp_path / "plan", ["--schemes", "local", "--batch-tokens", "4096"]
    small = [*ARGUMENTS, *schemes, "--memory-gib", "0.1"]
    assert main([*small, "--json", "-", "--write", str(folder)]) == 1
    said, aside = capsys.readouterr()
    assert json.loads(said)["best"] == []
    assert f"no layout fits, so {folder} is not written" in aside
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--svg", "a.svg"], "--svg draws what --scaling finds; add --scaling"),
        (["--scaling", "fixed", "--write", "f"], "--write is for the best layout, which --scaling"),
        (["--scaling", "fixed", "--tokens", "1e9"], "--tokens is for the best layout"),
        (["--scaling", "fixed", "--tokens-only"], "--tokens-only is for the best layout"),
        (["--scaling", "growing", "--best", "2"], "--best is for the best layout"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, said, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([*ARGUMENTS, *options])
    assert_one_sentence(capsys.readouterr().err.strip(), said)
