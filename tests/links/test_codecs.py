"""What codecs keep and what they lose, by hand on small numbers and by bounds on random ones."""

import pytest
import torch

from ds_local.config.files import local_parallel
from ds_local.config.sections import LinkConfig
from ds_local.errors import ConfigError
from ds_local.links.codecs import CODECS, decode, encode


def through(hidden, codec, **options):
    return decode(encode({"hidden": hidden}, codec, LinkConfig(codec=codec, **options)))["hidden"]


def parts_of(hidden, codec, **options):
    encoded = encode({"hidden": hidden}, codec, LinkConfig(codec=codec, **options))
    return {name.split("|")[2]: tensor for name, tensor in encoded.items()}


def num_bytes(hidden, codec, **options):
    return sum(
        t.nbytes
        for t in encode({"hidden": hidden}, codec, LinkConfig(codec=codec, **options)).values()
    )


def random_hidden(*shape, dtype=torch.float32):
    """Tokens of very different size, as in real models."""
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.randint(-3, 4, (*shape[:-1], 1), generator=generator)
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


def test_int8_by_hand():
    hidden = torch.tensor([[127.0, -63.5, 0.6, -127.0], [0.0, 0.0, 0.0, 0.0]])
    parts = parts_of(hidden, "int8")
    assert parts["scale"].flatten().tolist() == [1.0, 0.0]
    assert parts["values"].flatten(1).tolist() == [[127, -64, 1, -127], [0, 0, 0, 0]]
    assert through(hidden, "int8").tolist() == [[127.0, -64.0, 1.0, -127.0], [0.0, 0.0, 0.0, 0.0]]


def test_int4_by_hand():
    hidden = torch.tensor([[3.5, -0.3, -3.5, 1.0]])  # scale 0.5: 7, -1 (-0.6), -7, 2
    assert parts_of(hidden, "int4")["values"].flatten().tolist() == [
        (7 + 8) | (-1 + 8) << 4,
        (-7 + 8) | (2 + 8) << 4,
    ]
    assert through(hidden, "int4").tolist() == [[3.5, -0.5, -3.5, 1.0]]


def test_int4_in_groups_by_hand():
    hidden = torch.tensor([[70.0, -70.0, 0.7, 0.42]])
    alone, grouped = through(hidden, "int4"), through(hidden, "int4", group_size=2)
    assert alone.tolist() == [[70.0, -70.0, 0.0, 0.0]]
    assert grouped[0, 2:].tolist() == pytest.approx([0.7, 0.4], rel=0.01)  # steps of 0.1


def test_topk_by_hand():
    hidden = torch.tensor([[1.0, -127.0, 0.0, 2.0, -3.0, 0.5, 0.1, 0.2, 64.0]])
    parts = parts_of(hidden, "topk", keep=1 / 3)
    assert parts["mask"].tolist() == [[1 << 1 | 1 << 4, 1]]
    assert parts["values"].tolist() == [[-127, -3, 64]]
    assert through(hidden, "topk", keep=1 / 3).tolist() == [
        [0.0, -127.0, 0.0, 0.0, -3.0, 0.0, 0.0, 0.0, 64.0]
    ]


def test_lowrank_finds_a_subspace():
    generator = torch.Generator().manual_seed(1)
    hidden = (
        torch.randn(48, 3, generator=generator) @ torch.randn(3, 32, generator=generator)
    ).view(4, 12, 32)
    exact = through(hidden, "lowrank", rank=3)
    torch.testing.assert_close(exact, hidden, rtol=0, atol=0.02 * hidden.abs().max().item())
    # close to the best approximation there is, that of the singular value decomposition
    noisy = hidden.flatten(0, 1) + 0.3 * torch.randn(48, 32, generator=generator)
    u, s, v = torch.linalg.svd(noisy)
    best = (noisy - u[:, :3] * s[:3] @ v[:3]).norm()
    assert (noisy - through(noisy, "lowrank", rank=3)).norm() < 1.02 * best


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("codec", "levels"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("group_size", [None, 8])
def test_rounding_is_off_by_half_a_step_at_most(codec, levels, group_size, dtype):
    hidden = random_hidden(3, 17, 32, dtype=dtype)
    got = through(hidden, codec, group_size=group_size) if group_size else through(hidden, codec)
    groups = hidden.float().unflatten(-1, (-1, group_size or 32))
    half_step = groups.abs().amax(-1, keepdim=True) / levels / 2
    off = (got.float() - hidden.float()).abs().unflatten(-1, (-1, group_size or 32))
    assert got.dtype == dtype
    assert got.shape == hidden.shape
    # the scale is rounded to 8 bits, as is a bfloat16 result
    assert (
        off <= half_step * (1 + 2**-8) + (2**-8 * groups.abs() if dtype == torch.bfloat16 else 0)
    ).all()


def test_bf16_keeps_eight_bits_and_bf16_states_as_they_are():
    hidden = random_hidden(2, 5, 8)
    assert ((through(hidden, "bf16") - hidden).abs() <= hidden.abs() * 2**-8).all()
    narrow = hidden.bfloat16()
    assert encode({"hidden": narrow}, "bf16", LinkConfig(codec="bf16"))["hidden"] is narrow


# 2 x 64 tokens of 128 features
BYTES = {
    ("none", ()): 128 * 512,
    ("bf16", ()): 128 * 256,
    ("int8", ()): 128 * (128 + 2),
    ("int8", (("group_size", 32),)): 128 * (128 + 4 * 2),
    ("int4", ()): 128 * (64 + 2),
    ("int4", (("group_size", 32),)): 128 * (64 + 4 * 2),
    ("topk", (("keep", 1 / 16),)): 128 * (16 + 8 + 2),
    ("lowrank", (("rank", 16),)): 128 * 16 + 16 * 2 + 128 * 16 * 2,
}


@pytest.mark.parametrize(("codec", "options"), BYTES, ids=str)
def test_bytes_on_the_link(codec, options):
    assert num_bytes(random_hidden(2, 64, 128), codec, **dict(options)) == BYTES[codec, options]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(2, 3, 7), (5, 33), (1, 1, 1), (2, 3, 4, 6)])
def test_any_shape_comes_back(codec, shape):
    hidden = random_hidden(*shape)
    got = through(hidden, codec)
    assert got.shape == hidden.shape
    assert got.is_contiguous()
    again = through(hidden, codec)
    assert torch.equal(got, again)


@pytest.mark.parametrize("codec", CODECS)
def test_only_the_hidden_state_is_encoded_and_keeps_its_place(codec):
    message = {
        "hidden.0": torch.arange(6).view(2, 3),
        "hidden.1": random_hidden(2, 3, 8),
        "hidden.2": torch.full((3, 3), -torch.inf),
    }
    encoded = encode(message, codec, LinkConfig(codec=codec), "hidden.1")
    assert encoded["hidden.0"] is message["hidden.0"]
    assert encoded["hidden.2"] is message["hidden.2"]
    assert "hidden.1" not in encoded
    assert list(decode(encoded)) == list(message)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(codec, bad):
    hidden = random_hidden(2, 4, 16)
    hidden[1, 2, 3] = bad
    assert not through(hidden, codec)[1, 2, 3].isfinite()


@pytest.mark.parametrize("codec", CODECS)
def test_no_graph_crosses_a_link(codec):
    hidden = random_hidden(2, 4, 16).requires_grad_()
    got = through(hidden, codec)
    assert got.is_leaf
    assert not got.requires_grad


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ({"codec": "int9"}, "local_parallel.link.codec"),
        (
            {"codec": "int8", "rank": 4},
            "rank means nothing with codec .int8.; remove it, or set codec to lowrank",
        ),
        ({"keep": 0.5}, "keep means nothing with codec .none."),
        ({"codec": "topk", "keep": 0}, "local_parallel.link.keep"),
        ({"codec": "int4", "group_size": 3}, "multiple of 2"),
    ],
)
def test_mistakes_are_sentences(link, words):
    with pytest.raises(ConfigError, match=words):
        local_parallel({"local_parallel": {"link": link}})


def test_a_list_of_codecs_needs_one_per_edge():
    section = local_parallel(
        {"local_parallel": {"link": {"codec": ["int8", "none", "topk"], "keep": 0.5}}}
    )
    assert [section.link.codec_above(segment) for segment in range(3)] == ["int8", "none", "topk"]
    section.check_lengths(4)
    with pytest.raises(ConfigError, match=r"link\.codec has 3 entries; 3 segments need 2"):
        section.check_lengths(3)
