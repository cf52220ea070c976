"""Sections of the methods, with shares made counts."""

from ds_local.study.methods import METHODS, section_of


def test_shares_become_numbers_of_micro_batches():
    section = section_of(METHODS["mixed 1/4, tail 20 %"], 4, 8, 100)
    first, end = section["phases"]
    assert first == {
        "mix": [{"mode": "backprop", "micro_batches": 2}, {"mode": "local"}],
        "until_step": 80,
    }
    assert end == {"mode": "backprop"}
    assert (section["num_stages"], section["segments_per_stage"]) == (1, 4)
    assert section_of(METHODS["mixed 1/8"], 4, 4, 100)["mix"][0]["micro_batches"] == 1


def test_a_method_is_not_changed_by_what_is_made_of_it():
    method = METHODS["mixed 1/4, last 40 % half corrected"]
    assert section_of(method, 4, 8, 100) == section_of(method, 4, 8, 100)
    assert method.scheme["mix"][0] == {"mode": "backprop", "share": 0.25}
    assert method.end["mix"][0] == {"mode": "backprop", "share": 0.5}
