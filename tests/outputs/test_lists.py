"""What was changed in a folder since we wrote it."""

from written import KIND, make

from ds_local.outputs import damage, new_folder


def test_damage_is_found_and_named(tmp_path):
    place = tmp_path / "place"
    make(place)
    assert damage(place) == ""
    for change, said in (
        (lambda p: p.write_text("OLD"), "a.txt changed since it was written"),
        (lambda p: p.write_text("older"), "a.txt has 5 bytes instead of 3"),
        (lambda p: p.unlink(), "a.txt is missing"),
        (lambda p: p.mkdir(), "a.txt is missing"),
    ):
        change(place / "a.txt")
        assert damage(place) == said
    assert "missing or damaged" in damage(tmp_path)


def test_of_much_a_sample_is_read_and_every_size(tmp_path):
    with new_folder(tmp_path / "place", KIND) as new:
        (new / "small").write_bytes(b"x")
        for number in range(20):
            (new / f"{number:02}").write_bytes(bytes(1000))
    shard = tmp_path / "place" / "07"
    shard.write_bytes(bytes(999) + b"\1")
    found = [damage(tmp_path / "place", 5000, sample) for sample in range(100)]
    assert 5 < sum("07 changed" in said for said in found) < 60  # a quarter of them
    assert found == [damage(tmp_path / "place", 5000, sample) for sample in range(100)]
    assert damage(tmp_path / "place", 0) == ""
    assert "07 changed" in damage(tmp_path / "place", 20_001)
    shard.write_bytes(bytes(999))
    assert damage(tmp_path / "place", 0) == "07 has 999 bytes instead of 1,000"
    shard.write_bytes(bytes(1000))
    (tmp_path / "place" / "small").write_bytes(b"y")
    assert all("small changed" in damage(tmp_path / "place", 5000, sample) for sample in range(9))
