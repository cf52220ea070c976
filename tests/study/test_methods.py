"""Sections of the methods, with shares made counts."""

from ds_local.study.methods import METHODS, section_of


def test_shares_become_numbers_of_micro_batches():
    section = section_of(METHODS["mixed 1/4, tail 20 %"], 4, 8, 100, 512)
    first, end = section["phases"]
    assert first == {
        "mix": [{"mode": "backprop", "micro_batches": 2}, {"mode": "local"}],
        "until_step": 80,
    }
    assert end == {"mode": "backprop"}
    assert (section["num_stages"], section["segments_per_stage"]) == (1, 4)
    assert section_of(METHODS["mixed 1/8"], 4, 4, 100, 512)["mix"][0]["micro_batches"] == 1


def test_a_method_is_not_changed_by_what_is_made_of_it():
    method = METHODS["mixed 1/4, last 40 % half corrected"]
    assert section_of(method, 4, 8, 100, 512) == section_of(method, 4, 8, 100, 512)
    assert method.scheme["mix"][0] == {"mode": "backprop", "share": 0.25}
    assert method.end["mix"][0] == {"mode": "backprop", "share": 0.5}


def test_a_share_of_the_vocabulary_becomes_a_number_of_tokens():
    method = METHODS["chunked 2, 1/8 of the vocabulary, tail 40 %"]
    section = section_of(method, 4, 8, 100, 4096)
    assert section["head"] == {"vocabulary": 512}
    assert section["phases"][0] == {"mode": "chunked", "window": 2, "until_step": 60}
    assert method.head == {"vocabulary": 0.125}


def test_losses_are_dropped_over_the_first_half_of_the_steps():
    section = section_of(METHODS["deep supervision, dropped by half"], 4, 8, 800, 512)
    assert [phase.get("until_step") for phase in section["phases"]] == [100, 200, 300, None]
    assert section["phases"][-1] == {"mode": "backprop"}


def test_exits_are_compared_where_heads_learn_all_tokens_to_the_end():
    without = {"chunked 2, backprop tail 20 %", "local, 1/8 of the vocabulary"}
    without |= {"deep supervision, dropped by half"}
    assert not any(METHODS[name].has_exits for name in without)
    assert METHODS["chunked 2"].has_exits
    assert METHODS["local, 1/8 of the tokens, companion"].has_exits


def test_every_head_is_named_with_both_schemes_and_schedules():
    for scheme in ("local", "chunked 2"):
        for end in ("", ", tail 40 %", ", WSD", ", tail 40 %, WSD"):
            assert METHODS[f"{scheme}, 1/4 of the tokens{end}"].head == {"token_fraction": 0.25}
            shared = METHODS[f"{scheme}, shared readout{end}"].head
            assert shared == {"readout": "shared", "temperature": True}
            for steps in (10, 50):
                found = METHODS[f"{scheme}, shared readout, refreshed every {steps}{end}"]
                assert found.head == {**shared, "refresh_every": steps}
        assert METHODS[f"{scheme}, backprop tail 30 %, WSD"].tail == 0.3
