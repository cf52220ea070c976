"""What training should do, written down a second time without routes, schedules, stages or
DeepSpeed: one process, one autograd graph over the whole model per micro-batch, and a table of
which loss trains which segment."""

from __future__ import annotations

from itertools import pairwise

import torch

from ds_local.config.sections import HeadConfig
from ds_local.model import blocks, families

GPT2 = {
    "model_type": "gpt2",
    "n_layer": 4,
    "n_embd": 32,
    "n_head": 4,
    "vocab_size": 64,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MODELS = {"gpt2": GPT2, "llama": LLAMA}
SEED = 1234
# well above rounding: the gradient of an attention key bias is 0 in exact arithmetic, and Adam
# would blow up its noise
EPSILON = 1e-4


def table_of(
    mode: str, num_segments: int, window: int = 2, combine: str = "sum", weights=None, step: int = 0
) -> dict:
    """loss -> segment -> weight, from the definitions in the papers."""
    last = num_segments - 1
    table: dict[int, dict[int, float]] = {}

    def add(loss, segment, weight=1.0):
        table.setdefault(loss, {})[segment] = weight

    for s in range(num_segments):
        if mode == "backprop":
            add(last, s)
        elif mode == "local":
            add(s, s)
        elif mode == "interlocking":
            add(min(s + window - 1, last), s)
        elif mode == "overlapping":
            heard = [loss for loss in range(num_segments) if s <= loss < s + window]
            for loss in heard:
                add(loss, s, 1.0 if combine == "sum" else 1.0 / len(heard))
        elif mode == "deep_supervision":
            for loss in range(s, num_segments):
                factor = 1.0 if weights is None else weights[loss]
                if factor:
                    add(loss, s, factor)
        else:
            shift = step % window if mode == "shifted_chunked" else 0
            tops = [
                top for top in range(num_segments) if (top + 1 - shift) % window == 0 or top == last
            ]
            add(min(top for top in tops if top >= s), s)
    return table


class Reference:
    """All segments of a model in one process."""

    def __init__(
        self,
        family: str,
        parts: list[int],
        lr: float = 1e-2,
        clip: float = 1.0,
        seed: int = SEED,
        head: HeadConfig | None = None,
        counts: torch.Tensor | None = None,
    ) -> None:
        config = families.load_model_config(MODELS[family])
        depth = families.num_blocks(config)
        layers = [
            blocks.Embedding(config, seed),
            *(blocks.Block(config, i, seed) for i in range(depth)),
            blocks.Readout(config, seed),
        ]
        self.layers = layers
        self.num_segments = len(parts) - 1
        self.segments = [layers[a:b] for a, b in pairwise(parts)]
        self.heads = [
            blocks.make_head(config, s, seed, head or HeadConfig(), parts, counts)
            for s in range(self.num_segments - 1)
        ]
        self.parameters = [
            [p for layer in segment for p in layer.parameters()]
            + [p for head in self.heads[s : s + 1] for p in head.parameters()]
            for s, segment in enumerate(self.segments)
        ]
        self.clip = clip
        self.optimizers = [
            torch.optim.AdamW(p, lr=lr, eps=EPSILON, weight_decay=0.0) for p in self.parameters
        ]

    def losses(self, ids: torch.Tensor, wanted) -> dict[int, torch.Tensor]:
        hidden, losses = ids, {}
        for s, segment in enumerate(self.segments):
            last = s == self.num_segments - 1
            shallow = hidden
            for number, layer in enumerate(segment[: -1 if last else None]):
                hidden = layer(hidden)
                if s == number == 0:
                    shallow = hidden  # the embedding
            if s in wanted:
                losses[s] = (
                    segment[-1].loss(hidden, ids)
                    if last
                    else self.heads[s](hidden, ids, shallow.detach())
                )
        return losses

    def step(
        self, micro_batches: list[torch.Tensor], tables: list[dict], head_weights=None
    ) -> dict[int, float]:
        """One optimizer step.

        Args:
            tables: of each micro-batch.
            head_weights: factor on what each head learns from its own loss; default 1.

        Returns:
            The mean loss of each segment that has one.
        """
        scale = 1.0 / len(micro_batches)
        seen: dict[int, list[float]] = {}
        for ids, table in zip(micro_batches, tables, strict=True):
            for loss, value in self.losses(ids, table).items():
                seen.setdefault(loss, []).append(value.item())
                head = list(self._head_parameters(loss))
                factor = 1.0 if head_weights is None else head_weights[loss]
                self._add(head, torch.autograd.grad(value, head, retain_graph=True), scale * factor)
                for segment, weight in table[loss].items():
                    trunk = self._trunk_parameters(segment)
                    self._add(
                        trunk, torch.autograd.grad(value, trunk, retain_graph=True), scale * weight
                    )
        for parameters, optimizer in zip(self.parameters, self.optimizers, strict=True):
            if self.clip:
                torch.nn.utils.clip_grad_norm_(parameters, self.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {loss: sum(values) / len(values) for loss, values in seen.items()}

    def _head_parameters(self, loss: int):
        return (
            self.segments[-1][-1].parameters()
            if loss == self.num_segments - 1
            else self.heads[loss].parameters()
        )

    def _trunk_parameters(self, segment: int):
        """Parameters of the segment's layers; the readout counts as the last segment's head."""
        layers = self.segments[segment][: -1 if segment == self.num_segments - 1 else None]
        return [p for layer in layers for p in layer.parameters()]

    @staticmethod
    def _add(parameters, gradients, scale: float) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = (
                gradient * scale if parameter.grad is None else parameter.grad + gradient * scale
            )

    def state(self) -> dict[str, torch.Tensor]:
        state = {
            f"{i}.{name}": p.detach().clone()
            for i, layer in enumerate(self.layers)
            for name, p in layer.named_parameters()
        }
        return state | {
            f"heads.{s}.{n}": p.detach().clone()
            for s, head in enumerate(self.heads)
            for n, p in head.named_parameters()
        }


def batch(
    step: int, micro_batch: int, replica: int, size: int = 2, length: int = 16, vocabulary: int = 64
) -> torch.Tensor:
    """Token ids [size, length] with something to learn: every second token repeats the one
    before."""
    generator = torch.Generator().manual_seed(step * 1000 + micro_batch * 10 + replica)
    ids = torch.randint(0, vocabulary, (size, length), generator=generator)
    ids[:, 1::2] = ids[:, ::2]
    return ids
