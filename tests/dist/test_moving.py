"""A run that goes on in another layout: to the bit where segments are kept, by name everywhere."""

import json

import jobs
import pytest
import torch
from moves import KINDS, Layout, differing, joined, leg, losses_of
from ranks import RankError, run_ranks
from samples import sampled
from test_checkpoint import _seal

LOCAL = {"mode": "local"}
DEEP = {"model": {"n_layer": 12}}  # so that 2, 4, 3 and 1 stages can have 12 segments


def moved(folder, section, *layouts, **settings):
    """The results of a run on one layout after the other, of few micro-batches a step."""
    settings = {"total": 2, **settings}
    return [
        run_ranks(leg, one.ranks, str(folder), one, section, resume=n > 0, **settings)
        for n, one in enumerate(layouts)
    ]


def stayed(folder, section, layout, steps, total=2, **settings):
    settings |= {"steps": steps, "total": total, "save": False}
    return run_ranks(leg, layout.ranks, str(folder), layout, section, **settings)


def check_same(results, straight):
    """Losses and every tensor, to the bit."""
    losses = losses_of(straight)
    for one in results:
        mine = losses_of(one)
        assert mine == {at: losses[at] for at in mine}
    assert differing(joined(results[-1]), joined(straight)) == []


def test_2_4_3_1_stages_end_as_a_run_that_never_moved(tmp_path):
    layouts = [Layout(2, per_stage=6), Layout(4, per_stage=3), Layout(3, per_stage=4)]
    layouts.append(Layout(1, per_stage=12))
    results = moved(tmp_path / "moves", LOCAL, *layouts, steps=1, **DEEP)
    check_same(results, stayed(tmp_path / "stays", LOCAL, layouts[0], 4, **DEEP))
    assert results[1][0]["moved"].startswith("another layout: stages 2, now 4; ")
    assert "tensors moved by name, each compared with the checkpoint" in results[1][0]["moved"]


SECTIONS = {
    "mix": {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]},
    "interlocking": {"mode": "interlocking", "window": 2},
    "rates by segment": {"mode": "local", "warmup_stagger": 2},
    "copies": {
        "mode": "local",
        "head": {
            "readout": "shared", "blocks": 1, "blocks_from": "next_tracked", "refresh_every": 2,
        },
    },
    "cheap heads": {
        "mode": "local", "head": {"vocabulary": 8, "token_fraction": 0.5, "companion": 0.5},
    },
    "ahead": {"mode": "backprop", "run_ahead": "auto"},
}  # fmt: skip


@pytest.mark.parametrize("kind", sampled(["bf16 ZeRO-1"], [*KINDS]))
def test_every_precision_and_zero_stage_moves(tmp_path, kind):
    """From asynchronous saves, which are so held against a run that neither saves nor moves."""
    two, four = Layout(2, per_stage=2, kind=kind), Layout(4, kind=kind)
    results = moved(tmp_path / "moves", {**LOCAL, "async_save": True}, two, four)
    check_same(results, stayed(tmp_path / "stays", LOCAL, two, 6))
    assert differing(joined(results[0]), joined(results[1], "loaded")) == []


@pytest.mark.parametrize("section", sampled(["mix", "cheap heads", "ahead"], [*SECTIONS]))
def test_every_scheme_moves(tmp_path, section):
    steps = 7 if section == "copies" else 2
    layouts, counts = [Layout(2, per_stage=2), Layout(4)], {"token_counts": list(range(64))}
    results = moved(tmp_path / "moves", SECTIONS[section], *layouts, steps=steps, **counts)
    check_same(
        results, stayed(tmp_path / "stays", SECTIONS[section], layouts[0], steps * 2, **counts)
    )


def test_cheap_heads_move_in_bf16_and_zero_1(tmp_path):
    layouts = [Layout(2, per_stage=2, kind="bf16 ZeRO-1"), Layout(4, kind="bf16 ZeRO-1")]
    section, counts = SECTIONS["cheap heads"], {"token_counts": list(range(64))}
    results = moved(tmp_path / "moves", section, *layouts, steps=2, **counts)
    check_same(results, stayed(tmp_path / "stays", section, layouts[0], 4, **counts))


def test_replicas_change_with_the_same_sequences(tmp_path):
    """Two micro-batches a step: a sum of two has the same bits wherever it is taken."""
    one, two = Layout(2, per_stage=2), Layout(2, 2, 2)
    results = moved(tmp_path / "moves", LOCAL, one, two, one, steps=2)
    straight = stayed(tmp_path / "stays", LOCAL, one, 6)
    weights = [at for at in joined(straight) if at[1] != "losses"]
    assert differing(joined(results[-1]), joined(straight)) == []
    assert len(weights) > 100


def test_kinds_of_state_change_into_each_other_and_back(tmp_path):
    """fp32 copies and moments are kept to the bit through every precision and ZeRO stage."""
    kinds = ["fp32", "fp32 ZeRO-1", "bf16 ZeRO-1", "bf16", "fp32"]
    layouts = [Layout(2, 1 + (n in (1, 2)), 1, kind) for n, kind in enumerate(kinds)]
    first, *others = (
        run_ranks(leg, one.ranks, str(tmp_path), one, LOCAL, resume=n > 0, steps=2 * (n == 0))
        for n, one in enumerate(layouts)
    )
    assert differing(joined(first), joined(others[-1])) == []
    exact = {at: values for at, values in joined(first).items() if at[1] == "weights"}
    masters = {
        (name, "weights"): values
        for (name, key), values in joined(others[1]).items()
        if key == "masters"
    }
    assert differing(masters, exact) == []
    assert "precision fp32, now bf16" in others[1][0]["moved"]


def test_another_number_of_segments_keeps_the_heads_whose_cut_agrees(tmp_path):
    four, three = moved(tmp_path, LOCAL, Layout(4), Layout(3), steps=2)
    assert four[0]["cut"] == [0, 2, 3, 4, 6]
    assert three[0]["cut"] == [0, 2, 3, 6]
    before, after = joined(four), joined(three, "loaded")
    assert differing(
        {at: values for at, values in before.items() if not at[0].startswith("heads.after 4")},
        after,
    ) == []  # fmt: skip
    said = three[0]["moved"]
    assert "segments 4, now 3" in said
    assert said.endswith("; the checkpoint's head after 4 layers is left out")
    four = run_ranks(leg, 1, str(tmp_path), Layout(1, per_stage=4), LOCAL, resume=True)
    assert four[0]["moved"].endswith("; the head after 4 layers starts afresh")


def replica(results, number, which="left"):
    return {r["replica"]: r for r in results}[number][which]


@pytest.mark.parametrize("sync", sampled(["subnets"], ["periodic", "subnets"]))
def test_replicas_that_train_apart_move_with_what_each_has_of_its_own(tmp_path, sync):
    section = {**LOCAL, "replicas": {"sync": sync, "every": 2}}
    layouts = [Layout(1, 2, 4), Layout(2, 2, 2)]
    results = moved(tmp_path / "moves", section, *layouts)  # saved between two exchanges
    straight = stayed(tmp_path / "stays", section, layouts[0], 6)
    for number in (0, 1):
        whole = {at: v for r in straight if r["replica"] == number for at, v in r["left"].items()}
        mine = {at: v for r in results[1] if r["replica"] == number for at, v in r["left"].items()}
        assert differing(mine, whole) == []
    assert differing(replica(straight, 0), replica(straight, 1))


def outer_state(folder, layout, section):
    engine = jobs.build({**section, "segments_per_stage": layout.per_stage}, layout.stages, gas=2)
    engine.load_checkpoint(folder)
    kept = engine.replicas.extra_state()
    return {kind: {n: t.clone() for n, t in found.items()} for kind, found in kept.items()}


def test_another_number_of_replicas_goes_on_from_the_merged_model(tmp_path):
    section = {**LOCAL, "replicas": {"sync": "periodic", "every": 2}}
    two, three = Layout(1, 2, 4), Layout(1, 3, 4)
    saved = run_ranks(leg, 2, str(tmp_path), two, section, steps=5)  # the first two have rate 0
    results = run_ranks(
        leg, 3, str(tmp_path), three, section, resume=True, steps=0, total=6, save=False
    )
    pairs = replica(saved, 0), replica(saved, 1)
    for number in range(3):
        for (name, key, start), values in replica(results, number, "loaded").items():
            mean = (pairs[0][name, key, start] + pairs[1][name, key, start]) / 2
            torch.testing.assert_close(values, mean, rtol=1e-5, atol=1e-7)
    before = run_ranks(outer_state, 2, str(tmp_path), two, section)[0]
    after = run_ranks(outer_state, 3, str(tmp_path), three, section)
    for one in after:  # the outer step goes on with its momentum
        assert differing(one["velocity"], before["velocity"]) == []
        assert any(tensor.any() for tensor in one["velocity"].values())


def test_the_merged_model_of_subnets_may_depend_on_their_number(tmp_path):
    section = {**LOCAL, "replicas": {"sync": "subnets", "every": 2}}
    moved(tmp_path, section, Layout(1, 2, 4), steps=1)
    with pytest.raises(RankError, match=r"merged model with the factor 0\.5.*keep replicas and"):
        run_ranks(leg, 1, str(tmp_path), Layout(1, 1, 4), section, resume=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(leg, 2, str(folder), Layout(2, per_stage=2), LOCAL, steps=2)
    return folder


def test_a_checkpoint_of_a_version_that_kept_no_names_moves_too(tmp_path, checkpoint):
    import shutil

    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    place = folder / "global_step2"
    for name in ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"):
        content = torch.load(place / name, weights_only=False)
        del content["ds_local_names"]
        torch.save(content, place / name)
        _seal(place, name)
    named, older = (
        run_ranks(leg, 4, str(one), Layout(4), LOCAL, resume=True, save=False)
        for one in (checkpoint, folder)
    )
    assert differing(joined(named), joined(older)) == []


def moved_wrongly(folder):
    """Two tensors of the same shape trade places after they have been taken over."""
    from ds_local.engine.moving import Move

    load = Move.load

    def swapped(move):
        load(move)
        if move.engine.global_rank == 1:
            blocks = [p for p, name in move.names.items() if name.endswith("mlp.c_fc.weight")]
            one, other = (move.engine.optimizer.state[p] for p in (blocks[0], blocks[-1]))
            one["exp_avg"], other["exp_avg"] = other["exp_avg"], one["exp_avg"]

    Move.load = swapped
    try:
        jobs.build({**LOCAL, "segments_per_stage": 2}, 2, gas=4, **KINDS["fp32"]).load_checkpoint(
            folder
        )
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Move.load = load
    return "loaded"


def test_a_tensor_at_anothers_place_is_found_before_training_goes_on(tmp_path):
    run_ranks(leg, 4, str(tmp_path), Layout(4), LOCAL, steps=1)
    for said in run_ranks(moved_wrongly, 2, str(tmp_path)):
        assert said.startswith("CheckpointError: 2 tensors are not what the checkpoint has under")
        assert "3.block.mlp.c_fc.weight (exp_avg), 4.block.mlp.c_fc.weight (exp_avg)" in said


def files_read(folder):
    """Names of the files that a move reads into memory; the others are mapped."""
    from ds_local.engine import safe_files

    read, whole = safe_files._read, []

    def noting(source, map_location=None, **how):
        if not how.get("mmap"):
            whole.append(str(source))
        return read(source, map_location, **how)

    safe_files._read = noting
    try:
        jobs.build({**LOCAL, "segments_per_stage": 1}, 4).load_checkpoint(folder)
    finally:
        safe_files._read = read
    return whole


def test_no_rank_reads_another_stages_state_into_memory(checkpoint):
    assert run_ranks(files_read, 4, str(checkpoint)) == [[]] * 4


def test_a_kill_during_a_move_leaves_the_checkpoint_as_it_was(tmp_path, checkpoint):
    import shutil

    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # another rank says that it is gone, unless the pool sees it first
    with pytest.raises(RankError, match=r"rank 2|ranks \[2\] died"):
        run_ranks(leg, 4, str(folder), Layout(4), LOCAL, resume=True, dies=2)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before
    assert json.loads((folder / "global_step2" / "ds_local.json").read_text())["step"] == 2
    again, undisturbed = (
        run_ranks(leg, 4, str(one), Layout(4), LOCAL, resume=True, save=False)
        for one in (folder, checkpoint)
    )
    assert differing(joined(again), joined(undisturbed)) == []


def test_segments_that_a_schedule_deals_out_otherwise_move_there_and_back(tmp_path):
    import torch_sheets

    sheet = tmp_path / "interleaved.csv"
    torch_sheets.write("Interleaved1F1B", 2, 4, sheet)  # segments 0 and 2, 1 and 3
    plain = {"mode": "backprop"}
    dealt = {**plain, "schedule": str(sheet)}
    folder = str(tmp_path / "moves")
    run_ranks(leg, 4, folder, Layout(4), plain, steps=2)
    there = run_ranks(leg, 2, folder, Layout(2, per_stage=2), dealt, resume=True, steps=2)
    back = run_ranks(leg, 1, folder, Layout(1, per_stage=4), plain, resume=True, steps=2)
    assert "placement in order, now [0, 1, 0, 1]" in there[0]["moved"]
    check_same([there, back], stayed(tmp_path / "stays", plain, Layout(4), 6, total=4))
