"""Losses of language models, and the auxiliary head that gives an early segment a loss.

A head is: private blocks (or none) -> norm -> bottleneck or adapter (or none) -> readout ->
next-token cross-entropy. What makes it cheap is set in the config's "head" section: a sample of
the positions instead of all, a readout that is a read-only copy of the last stage's, a bottleneck,
the frequent part of the vocabulary. Logits of a whole micro-batch never exist where they would be
large.

Shapes: B sequences, T tokens, N positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ds_local.errors import ConfigError
from ds_local.links.device import to_device
from ds_local.model.compiled_loss import compiled_cross_entropy
from ds_local.model.logits import PLAIN, LogitRule
from ds_local.model.routers import Routers, without_logits
from ds_local.model.state import State, hidden_of

IGNORE = -100  # label of a position that does not count, as in Hugging Face models

# below this many logits the plain loss is faster, and there is little memory to save
_PLAIN_LOGITS = 1 << 20
# positions of a slice; on CPU much smaller ones, torch's own choice, cost several times the time
_SLICE = 512


def lm_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy of predicting each next token; the loss that Hugging Face's causal models
    compute.

    Args:
        labels_BT: the token ids themselves (int64); the shift by one happens here. `IGNORE` marks
            positions to leave out.

    Returns:
        A float32 scalar; 0 when no position counts.
    """
    logits_NV = logits_BTV[:, :-1].flatten(0, 1).float()
    targets_N = labels_BT[:, 1:].flatten()
    return F.cross_entropy(
        logits_NV, targets_N, ignore_index=IGNORE, reduction="sum"
    ) / count_targets(labels_BT).clamp(min=1)


def count_targets(labels_BT: Tensor) -> Tensor:
    """How many positions of `labels_BT` count in `lm_loss` (int64 scalar)."""
    return (labels_BT[:, 1:] != IGNORE).sum()


# --- cross-entropy of a linear readout ------------------------------------------------------------


def readout_loss(
    hidden_ND: Tensor, readout: nn.Linear, targets_N: Tensor, kernel: str, rule: LogitRule
) -> Tensor:
    """Summed cross-entropy of a model's logits. A readout with a bias and logits with a cap are
    computed in plain slices: kernels know neither."""
    if readout.bias is None and rule.cap is None:
        return linear_cross_entropy(rule.scaled(hidden_ND), readout.weight, targets_N, kernel)

    def plain(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = rule(readout(hidden)).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")

    return by_slices(plain, readout.weight.shape[0], hidden_ND, targets_N)


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, kernel: str = "torch"
) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T`, by slices of positions where the logits would be
    large.

    Args:
        targets_N: int64; `IGNORE` leaves a position out.
        kernel: an entry of `KERNELS`.

    Returns:
        A float32 scalar, equal to the plain computation up to rounding.
    """
    if hidden_ND.shape[0] * weight_VD.shape[0] <= _PLAIN_LOGITS:
        return F.cross_entropy(
            F.linear(hidden_ND, weight_VD).float(), targets_N, ignore_index=IGNORE, reduction="sum"
        )
    return KERNELS[kernel](hidden_ND, weight_VD, targets_N)


def _torch_kernel(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """torch's sliced operation (2.13 and later), which computes its gradients in the forward
    pass."""
    if not hasattr(F, "linear_cross_entropy"):
        return _checkpointed_kernel(hidden_ND, weight_VD, targets_N)
    options = _torch_options(hidden_ND.device.type)
    loss = F.linear_cross_entropy(
        hidden_ND, weight_VD, targets_N, ignore_index=IGNORE, reduction="sum", options=options
    )
    return loss.float()


@lru_cache
def _torch_options(device: str) -> Any:
    if device == "cpu":
        return nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=_SLICE)
    return nn.LinearCrossEntropyOptions()


def _checkpointed_kernel(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """For older torch: the logits of each slice are computed twice."""

    def slice_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            F.linear(hidden, weight_VD).float(), targets, ignore_index=IGNORE, reduction="sum"
        )

    return by_slices(slice_loss, weight_VD.shape[0], hidden_ND, targets_N)


def by_slices(slice_loss: Callable[..., Tensor], classes: int, *of_positions: Tensor) -> Tensor:
    """The sum of a loss over slices of positions, whose logits are computed twice; over all at once
    where these are few.

    Args:
        slice_loss: what `of_positions` have of a slice -> a scalar.
    """
    if len(of_positions[0]) * classes <= _PLAIN_LOGITS:
        return slice_loss(*of_positions)
    slices = zip(*(tensor.split(_SLICE) for tensor in of_positions), strict=True)
    losses = [checkpoint(slice_loss, *one, use_reentrant=False) for one in slices]
    return torch.stack(losses).sum()


def _liger_kernel(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    function = _optional(
        "liger_kernel.transformers.functional", "liger_kernel"
    ).liger_fused_linear_cross_entropy
    return function(hidden_ND, weight_VD, targets_N, ignore_index=IGNORE, reduction="sum").float()


def _cce_kernel(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Apple's cut cross-entropy, in the variant without gradient filtering that its authors give
    for pretraining."""
    function = _optional("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    options = {"ignore_index": IGNORE, "reduction": "sum", "impl": "cce_kahan_full_c"}
    try:
        return function(hidden_ND, weight_VD, targets_N, **options).float()
    except NotImplementedError as error:
        raise ConfigError(
            "head.kernel 'cce' needs the variant cce_kahan_full_c, which cut-cross-entropy 25.1.1 "
            "lacks; install it from its repository, or use kernel 'compiled'"
        ) from error


def _optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"head.kernel needs the package {package}: pip install {package}, or use kernel 'torch'"
        ) from error


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "torch": _torch_kernel,
    "checkpointed": _checkpointed_kernel,
    "liger": _liger_kernel,
    "cce": _cce_kernel,
    "compiled": compiled_cross_entropy,
}


# --- the auxiliary head ---------------------------------------------------------------------------


class AuxiliaryHead(nn.Module):
    """Hidden state of a segment -> its own language-model loss.

    Args:
        norm: [.., D] -> [.., D].
        readout: D (or the bottleneck's width) -> V, or the classes of `frequent`, linear. Weights
            without gradients are somebody's copy.
        blocks: private blocks before the norm, [B, T, D] -> [B, T, D].
        down: a bottleneck, D -> rank, or an adapter, D -> D.
        temperature: learn a factor on the logits.
        token_fraction: share of the positions whose loss is computed in training, drawn anew each
            time from torch's CPU generator; the loss is an unbiased estimate of that over all
            positions.
        kernel: see `linear_cross_entropy`.
        rule: what becomes of the readout's product.
        routers: of the private blocks; their loss is learned from in training.
        frequent: token ids -> classes, see `frequent.py`.
        sampled: the loss in training, instead of that over all classes of the readout.
        companion: a second loss in training, see `companion.py`.
    """

    def __init__(
        self,
        norm: nn.Module,
        readout: nn.Linear,
        blocks: Sequence[nn.Module] = (),
        down: nn.Linear | None = None,
        temperature: bool = False,
        token_fraction: float = 1.0,
        kernel: str = "torch",
        rule: LogitRule = PLAIN,
        routers: Routers | None = None,
        frequent: nn.Module | None = None,
        sampled: nn.Module | None = None,
        companion: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.routers = routers
        self.rule = rule
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.down = down
        self.readout = readout
        self.log_temperature = nn.Parameter(torch.zeros(1)) if temperature else None
        self.token_fraction = token_fraction
        self.kernel = kernel
        self.frequent, self.sampled, self.companion = frequent, sampled, companion

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`torch.compile` the private blocks; the loss has kernels of its own."""
        for block in self.blocks:
            block.compile(*args, **kwargs)

    def forward(self, state: State, labels_BT: Tensor, shallow_BTD: Tensor | None = None) -> Tensor:
        """The scalar loss of `lm_loss`, or in training an estimate of it. The companion, which
        needs the segment's input `shallow_BTD`, and experts of private blocks add to its gradient
        and not to its value."""
        hidden_BTD, router_loss = self._after_blocks(state)
        hidden_ND, targets_N, factor = (
            hidden_BTD[:, :-1].flatten(0, 1),
            labels_BT[:, 1:].flatten(),
            1.0,
        )
        if self.training and self.token_fraction < 1.0:
            total = len(targets_N)
            count = max(1, round(self.token_fraction * total))
            # drawn on the CPU: the same positions on any device
            chosen = to_device(torch.randperm(total)[:count], targets_N.device)
            hidden_ND, targets_N, factor = hidden_ND[chosen], targets_N[chosen], total / count
        hidden_ND = self._before_readout(hidden_ND)
        if self.training and self.sampled is not None:
            loss = self.sampled(hidden_ND, self.readout, targets_N, self.rule)
        else:
            classes_N = targets_N if self.frequent is None else self.frequent(targets_N)
            loss = readout_loss(hidden_ND, self.readout, classes_N, self.kernel, self.rule)
        loss = loss * factor / count_targets(labels_BT).clamp(min=1)
        if not self.training:
            return loss
        if self.companion is not None and shallow_BTD is not None:
            loss = _beside(loss, self.companion(self.norm(hidden_BTD), shallow_BTD, labels_BT))
        if self.routers is not None and router_loss is not None:
            loss = _beside(loss, self.routers.coefficient * router_loss)
        return loss

    def _after_blocks(self, state: State) -> tuple[Tensor, Tensor | None]:
        """(hidden state, router loss of the private blocks)."""
        for block in self.blocks:
            state = block(state)
        state, router_loss = without_logits(state, self.routers)
        return hidden_of(state), router_loss

    def _before_readout(self, hidden: Tensor) -> Tensor:
        hidden = self.norm(hidden)
        if self.down is not None:
            hidden = self.down(hidden)
        return hidden if self.log_temperature is None else hidden * self.log_temperature.exp()


def _beside(loss: Tensor, other: Tensor) -> Tensor:
    """The loss, with the other's gradient added to its own."""
    return loss + (other - other.detach())
