"""Names that hold in every layout."""

from ds_local.model.names import head_name, is_head, lasting_name, part_of


def test_layers_keep_their_number_and_heads_have_that_of_the_layers_below():
    parts = [0, 2, 6, 8]
    assert lasting_name("3.mlp.c_fc.weight", parts) == "3.mlp.c_fc.weight"
    assert lasting_name("heads.1.norm.weight", parts) == "heads.after 6.norm.weight"
    assert lasting_name("heads.0.blocks.0.w", [0, 6, 8]) == "heads.after 6.blocks.0.w"


def test_the_part_of_a_name():
    assert part_of("3.mlp.c_fc.weight") == "3"
    assert part_of("heads.after 6.norm.weight") == head_name(6) == "heads.after 6"
    assert is_head("heads.after 6.norm.weight")
    assert not is_head("3.mlp.heads.weight")
