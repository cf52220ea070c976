"""Pretrained weights -> pipeline layers. Each rank reads the tensors of its own layers and heads
from safetensors, a piece at a time, so its memory stays near its share of the model.

Pickled weights are never read. Tensor names are Hugging Face's; names without the base model's
prefix, and a few that older versions wrote, are found too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from ds_local.config import shipped
from ds_local.errors import WeightsError, first_line
from ds_local.model import families

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# bytes read at a time: a mapped file's pages count as memory of the process until it is closed
_PIECE = 4 << 20
_OLD_NAMES = {"lm_head.weight": ("embed_out.weight",)}  # GPT-NeoX before transformers 5
_FLOATS = ("F16", "BF16", "F32", "F64")  # types that are read
# masks and frequencies, which are computed, and which older versions wrote among the weights
_COMPUTED = re.compile(
    r"(attn|attention)\.(masked_)?bias$|rotary_emb\.(inv_freq|(cos|sin)_cached)$"
)
# weights in forms that are not read
HEADS_FILE = "auxiliary_heads.safetensors"  # beside an exported model, with its heads as they are
_OTHER_FORMS = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.ggml",
    "*.h5",
    "*.msgpack",
    "*.onnx",
)


def find_weights(model: str | Path) -> Path | None:
    """The folder with the safetensors of a model folder or hub name; None for a config file or a
    folder with a config alone.

    Raises:
        WeightsError: when there are weights, but only pickled ones, or a hub name has none.
    """
    folder = shipped.find(model)
    if folder.is_file():
        return None
    local = folder.is_dir()
    if not local:
        if folder.is_absolute() or str(model).startswith(".") or str(model).count("/") > 1:
            raise WeightsError(f"{model} does not exist; give a model folder or a hub name")
        folder = _downloaded(str(model))
    if (folder / _INDEX).is_file() or (folder / _SINGLE).is_file():
        return folder
    others = sorted(
        path.name
        for form in ("*.safetensors", *_OTHER_FORMS)
        for path in folder.glob(form)
        if path.name != HEADS_FILE
    )
    if local and not others:
        return None
    if others and others[0].endswith(".safetensors"):
        raise WeightsError(
            f"{model} has {others[0]}, but neither {_SINGLE} nor {_INDEX}; it is incomplete, or no "
            "whole model"
        )
    raise WeightsError(
        f"{model} has no safetensors{f' but {others[0]}' if others else ''}; pickled weights can "
        "run code when they are read. If you trust them, rewrite them with "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...); for fresh weights use "
        "--from-scratch"
    )


def _downloaded(name: str) -> Path:
    """The folder of a hub name in Hugging Face's cache, without what nobody here reads."""
    from huggingface_hub import snapshot_download

    wanted = ["model.safetensors", "model-*.safetensors", HEADS_FILE, "*.json", "tokenizer*"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # among them all errors of the hub's
        raise WeightsError(f"cannot fetch the weights of {name}: {first_line(error)}") from error


class Weights:
    """The tensors of a folder of safetensors, by Hugging Face's names.

    Raises:
        WeightsError: when the index or a file is missing or damaged, the tensors are not those of
            a model of this config, or they are quantized.
    """

    def __init__(self, folder: str | Path, config: Any) -> None:
        self.folder = Path(folder)
        self.config = config
        self._family = families.family_of(config)
        self._files: dict[str, str] = (
            self._index() if (self.folder / _INDEX).is_file() else self._names_in(_SINGLE)
        )
        if getattr(config, "quantization_config", None):
            raise WeightsError(f"{self.folder} is quantized; give the model as it was before")
        # of a family that the library saves in other pieces than it computes with
        self._whole: dict[str, Tensor] | None = None
        if self._is_in_other_pieces():
            self._whole = whole_model(self.folder).state_dict()
        else:
            self._check_names()

    def _is_in_other_pieces(self) -> bool:
        """Experts one by one, say, which are one tensor in the model."""
        if not get_checkpoint_conversion_mapping(self.config.model_type):
            return False
        wanted = families.skeleton(self.config).state_dict().keys()
        tied = f"{self._family.readout}.weight"
        return any(
            name != tied and not any(other in self._files for other in self._names_of(name))
            for name in wanted
        )

    def _check_names(self) -> None:
        """All tensors of the model, and no others."""
        wanted = families.skeleton(self.config).state_dict().keys()
        used = {self.name_of(name) for name in wanted}
        known = {other for name in wanted for other in self._names_of(name)}
        strange = [
            name for name in self._files if name not in used | known and not _COMPUTED.search(name)
        ]
        if strange:
            raise WeightsError(
                f"{self.folder} has {len(strange)} tensors that a model of its config lacks, as "
                f"{strange[0]}; is it of another model?"
            )

    def _index(self) -> dict[str, str]:
        try:
            found = json.loads((self.folder / _INDEX).read_text())["weight_map"]
            files = {str(name): Path(file).name for name, file in found.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise WeightsError(
                f"{self.folder / _INDEX} is no index of safetensors: {first_line(error)}"
            ) from error
        missing = sorted(name for name in set(files.values()) if not (self.folder / name).is_file())
        if missing:
            raise WeightsError(f"{self.folder / missing[0]} is missing; {_INDEX} names it")
        return files

    def _names_in(self, file: str) -> dict[str, str]:
        with self._opened(file) as tensors:
            return dict.fromkeys(tensors.keys(), file)

    def _opened(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"cannot read {self.folder / file}: {first_line(error)}") from error

    def _names_of(self, wanted: str) -> Iterator[str]:
        """The names that a tensor of the model may have."""
        base = self._family.tokens.partition(".")[0] + "."
        yield from (wanted, wanted.removeprefix(base), *_OLD_NAMES.get(wanted, ()))

    def name_of(self, wanted: str) -> str:
        """The name under which the folder has a tensor of the model.

        Raises:
            WeightsError: when it has none.
        """
        family = self._family
        names = list(self._names_of(wanted))
        if wanted == f"{family.readout}.weight" and not any(name in self._files for name in names):
            if not self.config.tie_word_embeddings:
                raise WeightsError(
                    f"{self.folder} has no tensor {wanted}, and its config does not tie it to the "
                    "embedding"
                )
            return self.name_of(f"{family.tokens}.weight")
        found = next((name for name in names if name in self._files), None)
        if found is None:
            raise WeightsError(
                f"{self.folder} has no tensor {wanted}, which a model of its config has; is it of "
                "another model?"
            )
        return found

    @torch.no_grad()
    def read_into(self, target: Tensor, wanted: str) -> None:
        """Copy one tensor of the model into `target`, a piece at a time.

        Raises:
            WeightsError: when it is missing, damaged or of another shape.
        """
        if self._whole is not None:
            target.copy_(self._whole[wanted])
            return
        name = self.name_of(wanted)
        file = self._files[name]
        with self._opened(file) as tensors:
            if name not in tensors.keys():  # noqa: SIM118 - not a dict
                raise WeightsError(
                    f"{self.folder / file} has no tensor {name}; {_INDEX} says it has"
                )
            kept = tensors.get_slice(name)
            shape, dtype = kept.get_shape(), kept.get_dtype()
        _check_type(self.folder / file, name, dtype)
        if list(shape) != list(target.shape):
            raise WeightsError(
                f"{self.folder / file}: tensor {name} has shape {shape}, the model needs "
                f"{list(target.shape)}"
            )
        for part in _pieces(target):
            with self._opened(file) as tensors:
                whole = tensors.get_tensor(name) if part is ... else tensors.get_slice(name)[part]
                target[part].copy_(whole)
            piece = target[part]
            # the sum first: it needs no memory, and is not finite where a part is not
            if not piece.sum().isfinite() and not piece.isfinite().all():
                raise WeightsError(f"{self.folder / file}: tensor {name} holds NaN or infinity")


def _pieces(target: Tensor) -> Iterator[Any]:
    """Places in a tensor that are read one after the other."""
    if not target.dim():
        yield ...
        return
    rows = max(1, _PIECE // max(1, target[:1].numel() * 4))
    for start in range(0, target.shape[0], rows):
        yield slice(start, start + rows)


def load_layer(layer: nn.Module, number: int, weights: Weights) -> None:
    """Fill pipeline layer `number`. Raises WeightsError."""
    names = families.tensor_names(weights.config, number)
    for own, tensor in layer.state_dict().items():
        weights.read_into(tensor, names[own])


def whole_model(model: str | Path) -> Any:
    """A causal language model as plain transformers makes it, all of its weights from safetensors.

    Raises:
        WeightsError: when weights are missing, damaged, pickled, or of another model.
    """
    folder = find_weights(model)
    if folder is None:
        raise WeightsError(f"{model} has no weights")
    for path in sorted(folder.glob("model*.safetensors")):
        _check_types(path)
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True
        )
    except Exception as error:  # a foreign folder can fail in many ways
        raise WeightsError(f"cannot load the model in {model}: {first_line(error)}") from error
    kinds = ("missing", "unexpected", "mismatched")
    wrong = [f"{kind} {sorted(info[f'{kind}_keys'])[0]}" for kind in kinds if info[f"{kind}_keys"]]
    if wrong:
        raise WeightsError(
            f"{model} has other weights than its config says ({', '.join(wrong)}); is it of "
            "another model?"
        )
    if not all(parameter.isfinite().all() for parameter in loaded.parameters()):
        raise WeightsError(f"{model} has weights that are NaN or infinite")
    return loaded.eval()


def _check_types(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as tensors:
            types = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"cannot read {path}: {first_line(error)}") from error
    for name, dtype in types.items():
        if not _COMPUTED.search(name):
            _check_type(path, name, dtype)


def _check_type(path: Path, name: str, dtype: str) -> None:
    """Raises WeightsError for a type that means nothing without its quantization."""
    if dtype not in _FLOATS:
        raise WeightsError(
            f"{path}: tensor {name} is of type {dtype}, which is no floating-point type that is "
            "read; give the model as it was before it was quantized"
        )
