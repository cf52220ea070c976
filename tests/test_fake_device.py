"""What makes or moves tensors, at sizes of real models on torch's fake device: all of it is there,
and the host reads none of its numbers."""

from types import SimpleNamespace

import pytest
import torch
from fakes import DEVICE, faked, moved, there

from ds_local.config.catalog import head_of
from ds_local.config.sections import HeadConfig, LinkConfig
from ds_local.engine import finite
from ds_local.engine.evaluation import evaluate
from ds_local.links.codecs import CODECS
from ds_local.links.messages import activation_message, copied_to, parts_of_activation
from ds_local.links.transport import MemoryLink
from ds_local.links.trees import Tree
from ds_local.measure.heads import PARTS, VARIANTS, gpt2_of, loss_of
from ds_local.model import blocks, compiled_loss, families
from ds_local.model.companion import Companion
from ds_local.model.heads import KERNELS, count_targets
from ds_local.model.split_linear import defer_weight_grads, make_splittable, run_deferred
from ds_local.replicas import cuts
from ds_local.replicas.head_copies import Copies, Copy

VOCABULARY, WIDTH, TOKENS = 50257, 64, 1024  # so many logits that kernels work in slices
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def config():
    return families.load_model_config(gpt2_of(WIDTH, VOCABULARY, TOKENS))


def hidden_and_labels(sequences=8):
    hidden = torch.empty(sequences, TOKENS, WIDTH, dtype=BF16, device=DEVICE)
    return hidden, torch.zeros(sequences, TOKENS, dtype=torch.int64, device=DEVICE)


def all_there(tensors, dtype=BF16):
    places = {(tensor.device, tensor.dtype) for tensor in tensors}
    return places == {(DEVICE, dtype)}


def check_learns(loss, inputs):
    assert (loss.device, loss.dtype, loss.shape) == (DEVICE, torch.float32, ())
    loss.backward()
    assert all_there(tensor.grad for tensor in inputs)


@pytest.mark.parametrize("kernel", ["torch", "checkpointed", "compiled"])
@pytest.mark.parametrize(
    "name",
    [
        "full",
        "shared readout, temperature",
        "1/8 of the vocabulary, 1/4 of the tokens",
        "1/16 of the vocabulary, 1/32 drawn",
        "shared readout, 1/16 of the vocabulary, 1/32 drawn",
        "shared readout, 1/8 of the tokens, companion",
        "a private block, 1/8 of the tokens",
        "rank 128, 1/8 of the tokens",
    ],
)
def test_heads(config, name, kernel, monkeypatch):
    assert kernel in KERNELS
    monkeypatch.setattr(compiled_loss, "_compiled", lambda: compiled_loss._slice_loss)
    given = head_of(VARIANTS[name], VOCABULARY)
    section = HeadConfig(**{**given, "kernel": kernel})
    made = blocks.make_head(config, 0, 1, section, PARTS)
    with faked():
        head = moved(made)
        hidden, labels = hidden_and_labels()
        learning = [weight for weight in head.parameters() if weight.requires_grad]
        check_learns(loss_of(head, hidden.requires_grad_(), labels), [hidden, *learning])
        with torch.no_grad():
            loss = head.eval()(hidden, labels)
        assert (loss.device, loss.dtype) == (DEVICE, torch.float32)


def test_the_models_own_readout(config):
    made = blocks.Readout(config, 1)
    with faked():
        readout = moved(made)
        hidden, labels = hidden_and_labels()
        inputs = [hidden.requires_grad_(), *readout.parameters()]
        check_learns(readout.loss(hidden, labels), inputs)


def test_a_companion_in_fp32_beside_a_hidden_state_in_bf16():
    made = Companion(torch.nn.Linear(WIDTH, WIDTH, bias=False), 0.5)
    with faked():
        companion = moved(made)
        hidden, labels = hidden_and_labels()
        loss = companion(hidden.requires_grad_(), there(hidden, torch.float32), labels)
        check_learns(loss, [hidden, *companion.parameters()])


def test_an_embedding_and_split_blocks(config):
    layers = [blocks.Embedding(config, 1), blocks.Block(config, 0, 1), blocks.Block(config, 1, 1)]
    made = torch.nn.Sequential(*layers)
    make_splittable(made)
    with faked():
        model = moved(made)
        hidden = model(torch.zeros(8, TOKENS, dtype=torch.int64, device=DEVICE))
        assert all_there([hidden])
        with defer_weight_grads() as deferred:
            hidden.backward(torch.empty_like(hidden))
        late = [weight for weight, _ in deferred]
        assert len(late) == 8  # four products in a block
        assert all(weight.grad is None for weight in late)
        run_deferred(deferred)
        assert all_there(weight.grad for weight in model.parameters())


@pytest.mark.parametrize("weight", [None, 0.5])
@pytest.mark.parametrize("codec", ["none", *CODECS])
def test_what_travels(codec, weight):
    link = LinkConfig(codec=codec)
    with faked():
        ids = copied_to(torch.zeros(8, TOKENS, dtype=torch.int32), DEVICE)
        hidden, _ = hidden_and_labels()
        figures = torch.zeros(2, 1, 15, dtype=torch.float64)
        message = activation_message(Tree.of(hidden), ids, figures, link, 0)
        on_host = {"figures"}
        assert {n for n, tensor in message.items() if tensor.device.type == "cpu"} == on_host
        came = parts_of_activation(message)
        assert all_there(came.hidden.slots)
        assert came.hidden.value().shape == hidden.shape
        assert all_there([came.labels.value()], torch.int32)


@pytest.mark.parametrize("kind", ["readout", "blocks"])
def test_copies_of_a_checkpoint_go_to_the_head(config, kind):
    section = HeadConfig(
        readout="shared", blocks=1, blocks_from="next_tracked", tracking=0.9, refresh_every=1
    )
    made = blocks.make_head(config, 0, 1, section, PARTS)
    saved = [weight.detach().clone() for weight in made.blocks.parameters()]
    saved = saved if kind == "blocks" else [made.readout.weight.detach().clone()]
    with faked():
        head = moved(made)
        weights = list((head.blocks if kind == "blocks" else head.readout).parameters())
        copy, written = Copy(kind, 1, 0), [weight._version for weight in weights]
        copies = Copies([copy], lambda *_: weights, lambda *_: MemoryLink(), 1, 1, 0.9)
        copies._pending[copy, 1] = saved
        copies.take(2)
        assert all(weight._version > v for weight, v in zip(weights, written, strict=True))
        assert all_there(weights)


def test_the_sums_of_an_evaluation(config):
    made = blocks.make_head(config, 0, 1, HeadConfig(), PARTS), blocks.Readout(config, 1)
    with faked():
        head, readout = map(moved, made)
        given = hidden_and_labels()
        executor = SimpleNamespace(
            device=DEVICE, run_ends=False, forward_only=lambda data, **_: given
        )
        module = SimpleNamespace(
            num_segments=4,
            local_segments=[0, 3],
            has_loss=lambda segment: True,
            weight_of=count_targets,
            loss_of=lambda segment, *batch: readout.loss(*batch) if segment else head(*batch),
            logits_of=readout,
        )
        with torch.no_grad():
            sums, logits = evaluate(executor, module, iter(()), 2, return_logits=True)
        assert all_there([sums], torch.float64)
        assert sums.shape == (2, 4)
        assert logits.shape == (8, TOKENS, VOCABULARY)
        assert all_there([logits])


def test_what_is_looked_at_for_finite_numbers():
    with faked():
        hidden, labels = hidden_and_labels()
        watch = finite.Watch()
        watch.see(finite.BELOW, 1, finite.state_in([hidden, labels], []), 0)
        watch.see(finite.OUTPUT, 1, finite.state_in([hidden], [hidden]), 0)
        watch.see(finite.LOSS, 1, [hidden.float().mean()], 0)
        watch.see(finite.SENT, 1, [None, hidden], 0)
        watch.see(finite.WEIGHTS, 1, [None])
        flags = watch.flags(DEVICE)
        assert flags.shape == (7,)
        assert all_there([flags], torch.float32)
        assert finite.Watch().flags(DEVICE).device == DEVICE


def test_pieces_of_weights_are_taken_and_put():
    held = torch.arange(0, 64, 2)
    with faked():
        weight = torch.empty(32 * 4, WIDTH, dtype=BF16, device=DEVICE)
        units = held[4:12]
        piece = cuts.take(weight, 0, 1, held, units)
        assert piece.shape == (8 * 4, WIDTH)
        assert all_there([piece])
        came = torch.empty(piece.shape, dtype=BF16)  # from another replica, over the host
        cuts.put(weight, 0, 1, held, units, came)
        assert all_there([weight])


def test_tensors_of_two_devices_do_not_meet():
    """The device of these tests itself."""
    with faked():
        hidden, labels = hidden_and_labels()
        with pytest.raises(Exception, match="same device"):
            hidden + torch.empty(hidden.shape)
        with pytest.raises(Exception, match="same device"):
            torch.cat([labels, torch.zeros(8, TOKENS, dtype=torch.int64)])
        with pytest.raises(Exception, match="_local_scalar_dense"):
            hidden.sum().item()
        with pytest.raises(RuntimeError, match="cannot pin a tensor of cuda:0"):
            hidden.pin_memory()
