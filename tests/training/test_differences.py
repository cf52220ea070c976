"""What differs between a run and the start that would continue it."""

from ds_local.config.schema import LocalParallelConfig
from ds_local.training.differences import (
    UNKNOWN,
    by_kind,
    differences,
    flat,
    in_words,
    of_checkpoint,
)

FACTS = {
    "config": {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
        "local_parallel": {"mode": "chunked", "seed": 5, "num_stages": 2, "link": {"depth": 8}},
    },
    "layout": {"replicas": 3},
    "model": {"n_layer": 4},
    "data": {"fingerprint": "abc", "seq_len": 16, "tokenizer_fingerprint": "def"},
}


def test_nested_settings_have_full_names():
    assert flat({"a": {"b": 0.5, "c": {}}, "d": [1]}) == {"a.b": 0.5, "d": [1]}


def test_each_setting_is_of_one_kind():
    found = by_kind(FACTS)
    assert found["seed"] == {"seed": 5}
    assert found["batch"] == {"sequences of a step": 48}
    assert found["data"] == {"fingerprint": "abc", "seq_len": 16}
    assert found["tokenizer"] == {"fingerprint": "def"}
    assert found["settings"] == {"optimizer.type": "AdamW", "optimizer.params.lr": 0.001}
    assert found["scheme"]["mode"] == "chunked"
    assert found["scheme"]["link.codec"] == "none"


def test_replicas_may_change_where_a_step_has_the_same_sequences():
    fewer = {**FACTS["config"], "gradient_accumulation_steps": 24}
    assert (
        by_kind({**FACTS, "config": fewer, "layout": {"replicas": 1}})["batch"]
        == (by_kind(FACTS)["batch"])
    )
    mix = [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]
    counted = {**FACTS["config"], "local_parallel": {"mix": mix}}
    assert by_kind({**FACTS, "config": counted})["batch"]["micro-batches"] == 8


def test_what_changes_no_figure_is_of_no_kind():
    names = {name for kind in by_kind(FACTS).values() for name in kind}
    assert not {"num_stages", "link.depth", "link.transfer", "compile", "layout"} & names


def test_a_config_of_another_version_is_compared_as_far_as_it_goes():
    found = by_kind({**FACTS, "config": {"local_parallel": {"modus": 1}, "steps_per_print": 5}})
    assert found["scheme"] == {}
    assert found["seed"] == {"seed": UNKNOWN}
    assert found["settings"] == {"steps_per_print": 5}


def test_a_checkpoint_knows_the_scheme_and_the_model():
    section = LocalParallelConfig(mode="chunked", seed=5).model_dump(mode="json")
    found = of_checkpoint({"local_parallel": section, "model": None})
    changed = differences(found["scheme"], by_kind(FACTS)["scheme"])
    assert changed == {}
    assert found["model"] == {}
    other = by_kind({**FACTS, "config": {"local_parallel": {"mode": "local"}}})
    assert differences(found["scheme"], other["scheme"]) == {}  # no batch size: another version's
    given = {"local_parallel": {"mode": "local"}, "train_micro_batch_size_per_gpu": 1}
    other = by_kind({**FACTS, "config": given})
    assert differences(found["scheme"], other["scheme"]) == {"mode": ("chunked", "local")}


def test_only_what_both_know_can_differ():
    old = {"a": 1, "b": (1, 2), "dtype": "float32", "gone": 1}
    new = {"a": 2, "b": [1, 2], "dtype": "bfloat16", "new": 1}
    assert differences(old, new) == {"a": (1, 2)}


def test_four_differences_are_named_and_the_rest_counted():
    changes = {f"k{n}": (n, "x" * 50 if n == 1 else n + 1) for n in range(6)}
    assert in_words(changes) == (
        f"k0 0, now 1, k1 1, now {'x' * 12}..., k2 2, now 3, k3 3, now 4 and 2 more"
    )
    assert in_words({"a": (1, 2)}) == "a 1, now 2"
