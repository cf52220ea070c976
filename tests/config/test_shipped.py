"""Which file a name means."""

from pathlib import Path

import pytest

from ds_local.config import shipped
from ds_local.config.files import load_config
from ds_local.errors import ConfigError, UnsupportedModel
from ds_local.model.config_file import read_config

CONFIGS = Path(__file__).parents[2] / "configs"


def test_shipped_ones_are_found_where_the_user_has_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2-nano.json", "deepspeed/gpt2-small.json"):
        for given in (name, f"configs/{name}"):
            assert shipped.find(given).samefile(CONFIGS / name)
    Path("gpt2-nano.json").write_text('{"model_type": "gpt2", "n_embd": 24, "n_head": 2}')
    assert shipped.find("gpt2-nano.json") == Path("gpt2-nano.json")
    assert read_config("gpt2-nano.json")[0].n_embd == 24
    assert read_config("configs/gpt2-nano.json")[0].n_embd == 128


@pytest.mark.parametrize(
    "name",
    ["ds_config.json", "gpt2.json", "local_parallel.schema.json", "hostfile", "/gpt2-nano.json"],
)
def test_other_names_stay_as_they_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.find(name) == Path(name)
    with pytest.raises(ConfigError, match="cannot read the DeepSpeed config"):
        load_config(name)


def test_an_unknown_model_is_told_the_names():
    with pytest.raises(UnsupportedModel, match=r"one of gpt2-large\.json, .*gpt2-nano\.json, "):
        read_config("gpt3.json")
