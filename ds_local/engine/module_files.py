"""A stage's files in a checkpoint: DeepSpeed's, one a layer, and one for each auxiliary head.

So the layer files fit a stock PipelineModule.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.utils import logger
from torch import Tensor, nn

from ds_local.checkpoints.facts import FACTS, head_options, read_facts
from ds_local.checkpoints.tensors import check_tensors
from ds_local.config.schema import LocalParallelConfig
from ds_local.config.strict import SECTION
from ds_local.engine.deepspeed_seam import PipelineModuleSeam
from ds_local.engine.safe_files import SafeCheckpointEngine
from ds_local.errors import CheckpointError
from ds_local.outputs.checkpoint_names import HEAD_FILE


class ModuleFiles(PipelineModuleSeam):
    """How a stage saves and loads its layers and heads. A part of `LocalPipelineModule`."""

    section: LocalParallelConfig
    heads: nn.ModuleDict
    num_segments: int
    on_load: list[Callable[[], None]]  # called when weights have been loaded

    def save_state_dict(
        self, save_dir: str, checkpoint_engine: Any, exclude_frozen_params: bool = False
    ) -> None:
        super().save_state_dict(save_dir, checkpoint_engine, exclude_frozen_params)
        if self.grid.data_parallel_id == 0:
            for segment, head in self.heads.items():
                state = clone_tensors_for_torch_save(head.state_dict())
                checkpoint_engine.save(
                    state_dict=state, path=os.path.join(save_dir, HEAD_FILE.format(int(segment)))
                )

    def load_state_dir(
        self, load_dir: str, checkpoint_engine: Any = None, strict: bool = True
    ) -> None:
        """Load the weights of this stage from layer files, and of the heads whose segments end at a
        layer where the checkpoint has one. Files of a stock `PipelineModule` will do.

        Raises:
            CheckpointError: when they are not of this model. Nothing has been changed by then.
        """
        engine = checkpoint_engine or SafeCheckpointEngine()
        heads = self.check_state_dir(load_dir, engine, strict)
        super().load_state_dir(load_dir, engine, strict)
        for segment, head in self.heads.items():
            path = heads[segment]
            if path is not None:
                head.load_state_dict(engine.load(path, map_location="cpu"), strict=strict)
            elif self.grid.data_parallel_id == 0:
                layer = self.segment_parts[int(segment) + 1]
                logger.warning(
                    f"{load_dir} has no head that fits after {layer} layers: that of segment "
                    f"{segment} starts afresh"
                )
        self._loaded()

    def _loaded(self, *_: Any) -> None:
        for follow in self.on_load:
            follow()

    def check_state_dir(
        self,
        load_dir: str,
        checkpoint_engine: Any,
        strict: bool = True,
        shape_of: Callable[[Tensor], torch.Size] = lambda tensor: tensor.shape,
    ) -> dict[str, str | None]:
        """Compare what `load_state_dir` would load with what there is, by names and shapes.

        Args:
            shape_of: the shape in a checkpoint of one of this stage's tensors.

        Returns:
            The file of each head, None where no head of the checkpoint fits.

        Raises:
            CheckpointError: naming the file and the tensors that do not fit.
        """
        for index, layer in enumerate(self.forward_funcs):
            if isinstance(layer, nn.Module):
                paths = self.ckpt_layer_path_list(load_dir, index)
                if not paths:
                    name = os.path.basename(self.ckpt_layer_path(load_dir, index))
                    raise CheckpointError(
                        f"{load_dir} has no {name}; give a checkpoint of the same model"
                    )
                if len(paths) == 1:  # several: slices for tensor parallelism, which DeepSpeed joins
                    found = checkpoint_engine.look(paths[0])
                    check_tensors(found, layer, paths[0], strict, shape_of)
        return {
            segment: self._head_file(int(segment), head, load_dir, checkpoint_engine, shape_of)
            for segment, head in self.heads.items()
        }

    def _head_file(
        self,
        segment: int,
        head: nn.Module,
        load_dir: str,
        checkpoint_engine: Any,
        shape_of: Callable[[Tensor], torch.Size],
    ) -> str | None:
        """Of the head that a checkpoint has where this segment ends, if it is of the same kind."""
        if not os.path.exists(os.path.join(load_dir, FACTS)):
            return None
        facts = read_facts(load_dir)
        segments = {end: number for number, end in enumerate(facts["segment_parts"][1:])}
        name = HEAD_FILE.format(segments.get(self.segment_parts[segment + 1], -1))
        if name not in facts["files"]:
            return None
        path = os.path.join(load_dir, name)
        try:
            check_tensors(checkpoint_engine.look(path), head, path, shape_of=shape_of)
        except CheckpointError:
            if head_options(facts) != head_options({SECTION: self.section.model_dump(mode="json")}):
                return None
            raise
        return path
