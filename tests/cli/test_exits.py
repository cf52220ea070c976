"""Which folders a MODEL argument means; a run is exported in tests/dist/test_exports.py."""

from pathlib import Path

from ds_local.cli.exits import exits_of


def test_a_model_folder_and_a_hub_name_have_one_exit(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "segment_0").mkdir()
    assert exits_of(str(tmp_path), "/nowhere") == {0: tmp_path}
    assert exits_of("somebody/model", "/nowhere") == {0: Path("somebody/model")}


def test_exits_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("segment_10", "segment_2", "segment_0", "segment_x"):
        (tmp_path / name).mkdir()
    (tmp_path / "segment_3").write_text("a file")
    found = exits_of(str(tmp_path), "/nowhere")
    assert list(found) == [0, 2, 10]
    assert found[10] == tmp_path / "segment_10"
