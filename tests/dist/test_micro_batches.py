"""Masks, positions and labels of a micro-batch on their way through the stages, and how much each
micro-batch counts."""

import functools
import itertools

import jobs
import pytest
import torch
from ranks import run_ranks
from reference import EPSILON, MODELS, Reference, batch, table_of
from samples import sampled

IGNORE = -100
PADDED = [[0] * 5 + [1] * 11, [1] * 16]


def collated(micro_batch):
    """As a Hugging Face collator gives them, padded on the left."""
    mask = torch.tensor(PADDED)
    ids = batch(0, micro_batch, 0) * mask
    labels = ids.masked_fill(mask == 0, IGNORE)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def padded(section, stages, keys, family, checkpoint=0):
    """Losses of an evaluation, and weights after three steps, on micro-batches with these keys."""
    import ds_local

    config = jobs.ds_config(section, gas=2, gradient_clipping=0.0)
    module = ds_local.causal_lm(
        MODELS[family],
        stages,
        config=config,
        activation_checkpoint_interval=checkpoint,
    )
    engine = ds_local.initialize(model=module, config=config)[0]
    given = [{key: collated(m)[key] for key in keys} for m in range(2)]
    data = itertools.cycle(given) if engine.is_first_stage() else None
    loss = engine.eval_batch(data).item()
    for _ in range(3):
        engine.train_batch(data)
    return {"loss": loss, "eval": engine.eval_losses, "state": jobs.state_of(engine)}


KEYS = [
    ("input_ids", "attention_mask", "position_ids", "labels"),
    ("input_ids", "attention_mask", "labels"),
    ("input_ids", "position_ids", "labels"),
]


@functools.cache
def trained_alone(family, keys):
    """The whole model of Hugging Face: its loss, and its weights after three steps."""
    from transformers import AutoModelForCausalLM

    from ds_local.model import families
    from ds_local.model.hf_layers import from_hf, to_hf

    config = families.load_model_config(MODELS[family])
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    layers = Reference(family, [0, 6]).layers
    model.load_state_dict(to_hf(config, {i: m.state_dict() for i, m in enumerate(layers)}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPSILON, weight_decay=0.0)
    first = None
    for _ in range(3):
        given = [{key: collated(m)[key] for key in keys} for m in range(2)]
        losses = [model(**one, use_cache=False).loss for one in given]
        if first is None:
            with torch.no_grad():
                counts = [(one["labels"][:, 1:] != IGNORE).sum() for one in given]
                first = sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)
        (sum(losses) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    parts = from_hf(config, model.state_dict())
    state = {f"{i}.{name}": t for i, part in parts.items() for name, t in part.items()}
    return first.item(), state


RANKS = {1: 0, 2: 1, 4: 0}  # ranks: are activations recomputed?


@pytest.mark.parametrize(
    ("family", "keys", "ranks"),
    sampled(  # all keys on any number of ranks, parts of them on one
        [
            (family, keys, ranks)
            for family in MODELS
            for keys, ranks in [(KEYS[0], 1), (KEYS[0], 4), (KEYS[1], 2)]
        ],
        [*itertools.product(MODELS, KEYS, RANKS)],
    ),
    ids=str,
)
def test_padding_counts_as_in_the_whole_model(family, keys, ranks):
    loss, state = trained_alone(family, keys)
    section = {"mode": "backprop", "segments_per_stage": 4 // ranks}
    for result in run_ranks(padded, ranks, section, ranks, keys, family, RANKS[ranks]):
        assert result["loss"] == pytest.approx(loss, rel=1e-5)
        for name, tensor in result["state"].items():
            torch.testing.assert_close(tensor, state[name], rtol=2e-4, atol=2e-5)


def test_heads_see_the_mask_too_and_ranks_make_no_difference():
    section = {"mode": "overlapping", "head": {"blocks": 1}}
    runs = []
    for ranks in (1, 4):
        parts = run_ranks(
            padded, ranks, {**section, "segments_per_stage": 4 // ranks}, ranks, KEYS[0], "llama"
        )
        runs.append({name: t for part in parts for name, t in part["state"].items()})
        evaluation = parts[0]["eval"]
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())
    whole = run_ranks(
        padded, 1, {**section, "segments_per_stage": 4}, 1, ("input_ids", "labels"), "llama"
    )
    assert all(evaluation[s] != whole[0]["eval"][s] for s in range(4))


# --- documents kept apart -----------------------------------------------------------------------

LENGTHS = [[(5, 1, 10), (16,)], [(2, 14), (7, 7, 2)]]  # of documents, by micro-batch and sequence


def documents(micro_batch):
    """As data folders with a document mask give them."""
    from ds_local.data.dataset import document_positions

    ids = batch(0, micro_batch, 0).clamp(min=1)
    for row, lengths in enumerate(LENGTHS[micro_batch]):
        ids[row, torch.tensor(lengths).cumsum(0) - 1] = 0
    positions = document_positions(ids, 0)
    return {"input_ids": ids, "position_ids": positions}, ids.masked_fill(positions == 0, IGNORE)


def with_documents(section, stages, family):
    """Losses of an evaluation, and weights after three steps."""
    import ds_local

    config = jobs.ds_config(section, gas=2, gradient_clipping=0.0)
    module = ds_local.causal_lm(MODELS[family], stages, config=config)
    engine = ds_local.initialize(model=module, config=config)[0]
    data = itertools.cycle(map(documents, range(2))) if engine.is_first_stage() else None
    loss = engine.eval_batch(data).item()
    for _ in range(3):
        engine.train_batch(data)
    return {"loss": loss, "state": jobs.state_of(engine)}


def each_document_alone(family):
    """The loss of every document by itself, and weights after three steps on their sum."""
    from torch.nn import functional as F

    layers = torch.nn.ModuleList(Reference(family, [0, 6]).layers)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-2, eps=EPSILON, weight_decay=0.0)
    first = None
    for _ in range(3):
        losses, counts = [], []
        for micro_batch, rows in enumerate(LENGTHS):
            ids, total = documents(micro_batch)[0]["input_ids"], torch.zeros(())
            for row, lengths in enumerate(rows):
                for document in ids[row : row + 1].split(list(lengths), dim=1):
                    hidden = document
                    for layer in layers:
                        hidden = layer(hidden)
                    total = total + F.cross_entropy(
                        hidden[0, :-1], document[0, 1:], reduction="sum"
                    )
            counts.append(sum(length - 1 for lengths in rows for length in lengths))
            losses.append(total / counts[-1])
        if first is None:
            first = sum(x.item() * n for x, n in zip(losses, counts, strict=True)) / sum(counts)
        (sum(losses) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {f"{i}.{n}": t for i, m in enumerate(layers) for n, t in m.state_dict().items()}
    return first, state


@pytest.mark.parametrize("family", MODELS)
def test_documents_of_a_sequence_learn_as_if_alone(family):
    loss, state = each_document_alone(family)
    for ranks in (1, 4):
        section = {"mode": "backprop", "segments_per_stage": 4 // ranks}
        for result in run_ranks(with_documents, ranks, section, ranks, family):
            assert result["loss"] == pytest.approx(loss, rel=1e-5)
            for name, tensor in result["state"].items():
                torch.testing.assert_close(tensor, state[name], rtol=2e-4, atol=2e-5)


def test_local_losses_see_documents_apart_and_ranks_make_no_difference():
    runs = []
    for ranks in (1, 2):
        section = {"mode": "local", "head": {"blocks": 1}, "segments_per_stage": 4 // ranks}
        parts = run_ranks(with_documents, ranks, section, ranks, "llama")
        runs.append({name: t for part in parts for name, t in part["state"].items()})
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


# --- how much a micro-batch counts --------------------------------------------------------------

COUNTED = [3, 15, 0, 7]  # of 15 positions in each sequence, by micro-batch


def uneven(step, micro_batch, replica):
    """(ids, labels) with so many labels that count."""
    ids = batch(step, micro_batch, replica)
    labels = ids.clone()
    labels[:, 1 + COUNTED[(micro_batch + replica + step) % 4] :] = IGNORE
    return ids, labels


def weighed(section, stages, steps, gas, **settings):
    engine = jobs.build(section, stages, gas=gas, gradient_clipping=0.0, **settings)
    reports, read = [], []
    engine.reports.listeners.append(lambda rows: reports.append([r.loss for r in rows]))

    def data():
        for step, micro_batch in itertools.product(range(steps), range(gas)):
            read.append((engine.global_steps, micro_batch))
            yield uneven(step, micro_batch, engine.replica_id)

    batches = data() if engine.is_first_stage() else None
    for _ in range(steps):
        engine.train_batch(batches)
    engine.eval_batch(iter([uneven(9, m, engine.replica_id) for m in range(gas)]))
    return {
        "reports": reports,
        "eval": engine.eval_losses,
        "state": jobs.state_of(engine),
        "read": read,
        "parts": engine.module.segment_parts,
    }


class ByTokens(Reference):
    """All tokens of a step count the same."""

    def losses(self, pair, wanted):
        ids, labels, factor = pair
        hidden, losses = ids, {}
        for s, segment in enumerate(self.segments):
            last = s == self.num_segments - 1
            for layer in segment[: -1 if last else None]:
                hidden = layer(hidden)
            if s in wanted:
                loss = segment[-1].loss(hidden, labels) if last else self.heads[s](hidden, labels)
                losses[s] = loss * factor
        return losses

    def step_of(self, pairs, tables):
        counts = [(labels[:, 1:] != IGNORE).sum().item() for _, labels in pairs]
        factors = [count * len(pairs) / sum(counts) for count in counts]
        triples = [(*pair, factor) for pair, factor in zip(pairs, factors, strict=True)]
        return super().step(triples, tables)


MIX = {"mix": [{"mode": "backprop", "micro_batches": 1}, {"mode": "local"}]}


WEIGHED = [{"mode": "local"}, {"mode": "backprop"}, MIX]
LAYOUTS = [(1, 1), (2, 1), (4, 1), (2, 2)]  # stages, replicas


@pytest.mark.parametrize(
    ("section", "layout"),
    sampled(  # every layout, and every section over replicas or over four stages
        [
            *zip([WEIGHED[0], WEIGHED[1], WEIGHED[2], WEIGHED[0]], LAYOUTS, strict=True),
            (WEIGHED[1], (2, 2)),
        ],
        [*itertools.product(WEIGHED, LAYOUTS)],
    ),
    ids=str,
)
def test_all_tokens_of_a_step_count_the_same(section, layout):
    (stages, replicas), steps, gas = layout, 2, 4
    section = {**section, "loss_weighting": "token", "segments_per_stage": 4 // stages}
    results = run_ranks(weighed, stages * replicas, section, stages, steps, gas)
    model = ByTokens("gpt2", results[0]["parts"], clip=0.0)
    local, true = table_of("local", 4), table_of("backprop", 4)
    first = {"local": local, "backprop": true}.get(section.get("mode"), true)
    tables = [first, *[first if "mode" in section else local] * (gas - 1)]
    for step in range(steps):
        pairs = [uneven(step, m, r) for m in range(gas) for r in range(replicas)]
        seen = model.step_of(pairs, [table for table in tables for _ in range(replicas)])
        for segment, loss in seen.items():
            reported = results[0]["reports"][step][segment]
            if "mix" not in section or segment == 3:
                assert reported == pytest.approx(loss, rel=1e-4)
    state = model.state()
    for result in results:
        for name, tensor in result["state"].items():
            torch.testing.assert_close(tensor, state[name], rtol=5e-4, atol=5e-5)


def test_micro_batches_count_the_same_by_default_and_are_read_when_needed():
    steps, gas = 2, 4
    section = {"mode": "local", "segments_per_stage": 4}
    default, again, tokens = (
        run_ranks(weighed, 1, {**section, **extra}, 1, steps, gas)[0]
        for extra in ({}, {"loss_weighting": "micro_batch"}, {"loss_weighting": "token"})
    )
    assert default["reports"] == again["reports"]
    assert default["reports"] != tokens["reports"]
    assert default["read"] == tokens["read"]  # no micro-batch of a later step
    model = Reference("gpt2", default["parts"], clip=0.0)

    def losses(pair, wanted):
        return ByTokens.losses(model, (*pair, 1.0), wanted)

    model.losses = losses
    for step in range(steps):
        seen = model.step([uneven(step, m, 0) for m in range(gas)], [table_of("local", 4)] * gas)
        assert default["reports"][step] == pytest.approx(list(seen.values()), rel=1e-4)


def test_tokens_can_be_counted_in_language_models_alone():
    import ds_local

    config = jobs.ds_config({"mode": "backprop", "loss_weighting": "token"})
    layers = [torch.nn.Linear(2, 2)] * 2
    with pytest.raises(
        ds_local.ConfigError, match="only the loss of language models counts tokens"
    ):
        ds_local.LocalPipelineModule(layers, 1, loss_fn=lambda h, y: h.sum(), config=config)


# --- what is refused, where the data is read ----------------------------------------------------


def refused(stages, odd):
    import ds_local

    engine = jobs.build({"mode": "local"}, stages, gas=1)
    data = iter([batch(0, 0, 0), odd]) if engine.is_first_stage() else None
    try:
        for _ in range(2):
            engine.train_batch(data)
    except ds_local.DsLocalError as error:
        return str(error)


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (batch(0, 0, 0) + 64, "the model has 64 tokens in its vocabulary: give 0 to 63"),
        (batch(0, 0, 0).float(), "input_ids has dtype float32"),
        ({"input_ids": batch(0, 0, 0), "token_type_ids": 0}, "token_type_ids, which nothing reads"),
    ],
    ids=["vocabulary", "float", "key"],
)
def test_ids_that_cannot_be_are_refused_on_every_stage(odd, words):
    for said in run_ranks(refused, 2, 2, odd):
        assert words in said
