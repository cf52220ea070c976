"""What a micro-batch is: (inputs, labels), taken from what the data loader gives, and checked.

Everything here looks at tensors where the data loader left them. Those that lie on a device already
are not looked into, since the host would wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.utils import logger
from torch import Tensor

from ds_local.errors import DataError
from ds_local.model.heads import IGNORE


def split_batch(batch: Any) -> tuple[Any, Any]:
    """(inputs, labels) of a micro-batch for layers of one's own: a pair, of any values that may
    travel between layers; token ids that are both; or a dict of the two.

    Raises:
        DataError: when it is something else, or a dict holds more.
    """
    if isinstance(batch, Tensor):
        return batch, batch
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if not isinstance(batch, Mapping):
        raise DataError(
            "a micro-batch must be (inputs, labels), a dict with input_ids, or token ids; got "
            f"{type(batch).__name__}"
        )
    given = {key: value for key, value in batch.items() if value is not None}
    _check_keys(given, {"input_ids", "labels"}, "give (inputs, labels), where inputs may be a dict")
    return given["input_ids"], given.get("labels", given["input_ids"])


class TokenBatches:
    """Micro-batches of a language model, as `split_batch` and with a Hugging Face collator's dicts.

    Args:
        vocab_size: of the model.
        num_positions: of its learned position embedding, if it has one.
    """

    KEYS = ("input_ids", "attention_mask", "position_ids", "labels")

    def __init__(self, vocab_size: int, num_positions: int | None) -> None:
        self.vocab_size, self.num_positions = vocab_size, num_positions
        self._is_first = True

    def split(self, batch: Any) -> tuple[Any, Tensor]:
        """(inputs, labels): ids [B, T] int64, or a dict of them, `attention_mask` and
        `position_ids`; labels [B, T] int32, which take half the room on links.

        Raises:
            DataError: when ids or labels are no integers or outside the vocabulary, shapes do not
                agree, labels are shifted, or a dict has a key that means nothing here.
        """
        given = dict(batch) if isinstance(batch, Mapping) else {}
        if not given:
            inputs, labels = split_batch(batch)
            given = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
            given["labels"] = labels
        given = {key: value for key, value in given.items() if value is not None}
        _check_keys(given, set(self.KEYS), "leave them out")
        has_labels = "labels" in given
        ids_BT = self._integers("input_ids", given["input_ids"])
        labels_BT = self._integers("labels", given["labels"]) if has_labels else ids_BT
        self._check_range("input_ids", ids_BT, self.vocab_size)
        if labels_BT is not ids_BT:
            self._check_shape("labels", labels_BT, [ids_BT.shape])
            self._check_range("labels", labels_BT, self.vocab_size, IGNORE)
        inputs = {"input_ids": ids_BT} | self._beside(given, ids_BT)
        if self._is_first:
            self._is_first = False
            _look_at(ids_BT, labels_BT, inputs.get("attention_mask"), has_labels)
        return inputs if len(inputs) > 1 else ids_BT, labels_BT.int()

    def _beside(self, given: Mapping[str, Any], ids_BT: Tensor) -> dict[str, Tensor]:
        """Mask and positions, where there are any."""
        num_tokens, limit = ids_BT.shape[1], self.num_positions
        beside = {}
        if "attention_mask" in given:
            mask = given["attention_mask"]
            if not isinstance(mask, Tensor) or mask.dim() != 4:
                mask = self._tensor("attention_mask", mask)
                self._check_shape("attention_mask", mask, [ids_BT.shape])
                mask = mask.bool()
            beside["attention_mask"] = mask
        if "position_ids" in given:
            positions = self._integers("position_ids", given["position_ids"])
            self._check_shape("position_ids", positions, [ids_BT.shape, (1, num_tokens)])
            if limit is not None:
                self._check_range("position_ids", positions, limit)
            beside["position_ids"] = positions
        elif limit is not None and num_tokens > limit:
            raise DataError(
                f"a micro-batch has sequences of {num_tokens} tokens but the model takes at most "
                f"{limit}; cut them shorter"
            )
        return beside

    def _tensor(self, name: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            hint = (
                '; of a datasets.Dataset with_format("torch") gives one'
                if isinstance(value, list)
                else ""
            )
            raise DataError(f"{name} is a {type(value).__name__}; give a tensor{hint}")
        return value

    def _integers(self, name: str, value: Any) -> Tensor:
        """As int64."""
        tensor = self._tensor(name, value)
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise DataError(
                f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; it must be "
                "integers: convert it with .long()"
            )
        if tensor.dim() != 2:
            raise DataError(
                f"{name} has shape {list(tensor.shape)}; it must be [sequences, tokens]"
            )
        return tensor.long()

    def _check_shape(self, name: str, tensor: Tensor, shapes: list[Any]) -> None:
        if tensor.shape not in shapes:
            raise DataError(
                f"{name} has shape {list(tensor.shape)} but input_ids has {list(shapes[0])}; "
                "they must agree"
            )

    def _check_range(self, name: str, values: Tensor, limit: int, also: int | None = None) -> None:
        """Values from 0 to `limit` - 1, or `also`."""
        if values.device.type != "cpu" or not values.numel():
            return
        low, high = (bound.item() for bound in values.aminmax())
        if high < limit and low >= 0:
            return
        wrong = (values >= limit) | ((values < 0) & (values != also))
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            what = "positions" if name == "position_ids" else "tokens in its vocabulary"
            beside = "" if also is None else f", or {also} where no token is to be predicted"
            raise DataError(
                f"{name} has {values[row, column].item()} at [{row}, {column}], but the model has "
                f"{limit} {what}: give 0 to {limit - 1}{beside}"
                + ("" if what == "positions" else "; was the data made with another tokenizer?")
            )


def _check_keys(given: Mapping[str, Any], known: set[str], remedy: str) -> None:
    holds = f"a dict holds {', '.join(sorted(known))}"
    if unknown := sorted(str(key) for key in given.keys() - known):
        raise DataError(
            f"a micro-batch has {', '.join(unknown)}, which nothing reads; {holds}: {remedy}"
        )
    if "input_ids" not in given:
        raise DataError(f"a micro-batch has no input_ids but {', '.join(given)}; {holds}")


def _look_at(ids_BT: Tensor, labels_BT: Tensor, mask: Tensor | None, has_labels: bool) -> None:
    """Refuse what cannot be meant, say what is probably not, in the first micro-batch."""
    if ids_BT.device.type != "cpu" or labels_BT.device.type != "cpu":
        return
    counted = labels_BT[:, :-1] != IGNORE
    ahead = (labels_BT[:, :-1] == ids_BT[:, 1:]) | ~counted
    same = (labels_BT == ids_BT) | (labels_BT == IGNORE)
    if counted.sum() > 2 and ahead.all() and not same.all():
        raise DataError(
            "labels are the input ids shifted by one already, but the loss shifts them itself, as "
            "Hugging Face's models do, so each position would learn the token after the next; give "
            "the input ids as labels"
        )
    if mask is not None and mask.dim() == 2 and not has_labels and not mask.all():
        logger.warning(
            "attention_mask marks padding but there are no labels, so padding is predicted too; "
            f"give labels with {IGNORE} there"
        )
