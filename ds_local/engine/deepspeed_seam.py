"""Every private or undocumented name of DeepSpeed that this package touches, and nothing else.

`NAMES` lists them; importing this module checks that all are there. What other files need of them
has a public name here: `PipelineModuleSeam` and `PipelineEngineSeam` are DeepSpeed's classes with
the private hooks that a local pipeline replaces turned into methods of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from inspect import getmembers, isfunction
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from ds_local.engine.deepspeed_version import REMEDY
from ds_local.engine.safe_files import SafeCheckpointEngine
from ds_local.errors import UnsupportedDeepSpeed

pipe_engine: Any = import_module("deepspeed.runtime.pipe.engine")

# owner -> the names of it that no page of DeepSpeed's documents
NAMES: dict[Any, tuple[str, ...]] = {
    deepspeed: ("set_optimizer_flags",),
    import_module("deepspeed.comm.torch"): ("build_shm_op",),
    dist.comm: ("cdb",),
    pipe_engine: ("p2p",),
    pipe_engine.p2p: ("init_process_groups", "recv", "send"),
    PipelineEngine: (
        "_INSTRUCTION_MAP",
        "_backward_prologue_per_tensor",
        "_config",
        "_configure_python_gc",
        "_copy_recovery_script",
        "_exec_reduce_grads",
        "_load_zero_checkpoint",
        "_next_batch",
        "_report_progress",
        "_take_model_step",
        "basic_optimizer",
        "clip_fp32_gradients",
        "using_bf16_optimizer",
    ),
    PipelineModule: (
        "_build",
        "_count_layer_params",
        "_grid",
        "_local_start",
        "_partition_layers",
        "_set_bounds",
        "forward_funcs",
    ),
    PipelineParallelGrid: (
        "_topo",
        "dp_group",
        "get_slice_parallel_group",
        "get_slice_parallel_rank",
        "get_slice_parallel_world_size",
    ),
    MonitorMaster: ("csv_monitor", "enabled"),
    csvMonitor: ("filenames", "log_dir"),
    DeepSpeedEngine: (
        "_ADAM_HALF_KEYS",
        "_MUON_HALF_KEYS",
        "_load_checkpoint",
        "checkpoint_mp_rank",
    ),
    BF16_Optimizer: ("mpu", "bf16_groups", "fp32_groups_flat_partition", "_hp_mapping"),
    DeepSpeedZeroOptimizer: (
        "mpu",
        "bit16_groups",
        "single_partition_of_fp32_groups",
        "_hp_mapping",
        "model_parallel_group",
        "model_parallel_rank",
        "model_parallel_world_size",
    ),
    DeepSpeedBF16Config: ("immediate_grad_update",),
}


def _has(owner: Any, name: str) -> bool:
    """Is `name` an attribute or field of `owner`, or do methods of that class use it?"""
    if hasattr(owner, name) or name in getattr(owner, "model_fields", ()):
        return True
    methods = (method for _, method in getmembers(owner, isfunction))
    return isinstance(owner, type) and any(name in m.__code__.co_names for m in methods)


def check_names(names: Mapping[Any, tuple[str, ...]] = NAMES) -> None:
    """Raises UnsupportedDeepSpeed for the first name that the installed DeepSpeed lacks."""
    for owner, wanted in names.items():
        for name in wanted:
            if not _has(owner, name):
                raise UnsupportedDeepSpeed(
                    f"DeepSpeed {deepspeed.__version__} has no {owner.__name__}.{name}; {REMEDY}"
                )


check_names()
# Only inference uses DeepSpeed's shared-memory op for CPUs, yet every start loads it: it is
# compiled first (a start killed meanwhile leaves a lock on which all later ones wait in silence),
# and each run leaves 64 MB per rank behind in /dev/shm.
import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]

# --- processes ----------------------------------------------------------------------------------

ENGINES: WeakSet[Any] = WeakSet()  # of this process


# --- the module ---------------------------------------------------------------------------------


class PipelineModuleSeam(PipelineModule):
    """DeepSpeed's `PipelineModule`, which asks where this stage's layers are and builds them."""

    layer_numbers: list[int]  # in the whole model, of the layers in `forward_funcs`

    def runs(self) -> list[range]:
        """Numbers of this stage's layers, one range for each run of them. Called before they are
        built."""
        raise NotImplementedError

    def built(self) -> None:
        """Called when this stage's layers are built."""

    def _partition_layers(self, method: str = "parameters") -> None:
        self._set_bounds(0, 0)

    def _build(self) -> None:
        runs = self.runs()
        for run in runs:
            self._set_bounds(run.start, run.stop)
            super()._build()
        self._set_bounds(runs[0].start, runs[-1].stop)
        self.layer_numbers = [number for run in runs for number in run]
        self.built()

    def ckpt_layer_path(self, ckpt_dir: str, local_layer_idx: int) -> str:
        """DeepSpeed takes a stage's layers to follow each other."""
        return super().ckpt_layer_path(ckpt_dir, self._offset_of(local_layer_idx))

    def ckpt_layer_path_list(self, ckpt_dir: str, local_layer_idx: int) -> list[str]:
        """As `ckpt_layer_path`, of all slices."""
        return super().ckpt_layer_path_list(ckpt_dir, self._offset_of(local_layer_idx))

    def _offset_of(self, position: int) -> int:
        return self.layer_numbers[position] - self._local_start

    @property
    def grid(self) -> Any:
        """Who is where: stages, replicas and their process groups."""
        return self._grid

    def count_layer_parameters(self) -> list[int]:
        """Of every layer of the whole model those that take gradients."""
        return self._count_layer_params()


# --- the engine ---------------------------------------------------------------------------------


class PipelineEngineSeam(PipelineEngine):
    """DeepSpeed's `PipelineEngine` with gradients scaled by nobody and norms of one stage alone.

    A subclass names the method that runs each instruction in `INSTRUCTIONS`.
    """

    INSTRUCTIONS: ClassVar[dict[type, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._INSTRUCTION_MAP = {**PipelineEngine._INSTRUCTION_MAP, **cls.INSTRUCTIONS}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _no_first_messages():
            super().__init__(*args, **kwargs)

    def run_instruction(self, instruction: Any) -> None:
        """Run it by the method that its class is mapped to."""
        self._INSTRUCTION_MAP[type(instruction)](self, **instruction.kwargs)

    def next_batch(self) -> Any:
        """Of the data iterator, through DeepSpeed's `set_batch_fn`."""
        return self._next_batch()

    def average_gradients(self) -> None:
        """Over the replicas of this stage."""
        super()._exec_reduce_grads()

    def step_optimizer(self, lr_kwargs: Any) -> None:
        """Optimizer step and scheduler step, as DeepSpeed does them."""
        super()._take_model_step(lr_kwargs)

    def take_step(self, lr_kwargs: Any) -> None:
        """What a step ends with; a subclass may look at the gradients first."""
        self.step_optimizer(lr_kwargs)

    def _take_model_step(self, lr_kwargs: Any, block_eigenvalue: Any = None) -> None:
        self.take_step(lr_kwargs)

    def load_zero_checkpoint(self, load_dir: str, tag: str) -> None:
        """The optimizer's shards, from ZeRO's files."""
        self._load_zero_checkpoint(load_dir, tag)

    def rank_of(self, stage: int, replica: int) -> int:
        """Global rank of one stage of one replica."""
        return self.grid._topo.get_rank(pipe=stage, data=replica)

    def stage_of(self, rank: int) -> int:
        """Stage of a global rank."""
        return self.grid._topo.get_coord(rank).pipe

    def name_files_by(self, stage: int) -> None:
        """The files of checkpoints have this number, which is that of the stage in the whole
        pipeline."""
        self.checkpoint_mp_rank = self._stage_of_files = stage

    def _load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed takes a file for its place among those that are there."""
        self.checkpoint_mp_rank = self.stage_id
        try:
            return super()._load_checkpoint(*args, **kwargs)
        finally:
            self.checkpoint_mp_rank = self._stage_of_files

    def use_safe_checkpoints(self) -> None:
        """Read checkpoint files without running what is in them."""
        self.checkpoint_engine: Any = SafeCheckpointEngine(self._config)

    def keep_norms_local(self) -> None:
        """Clip and check overflow per stage: the reductions over all stages would bring the bubble
        back at every step."""
        if hasattr(self.optimizer, "mpu"):
            self.optimizer.mpu = _StageLocal(self.grid)
        if hasattr(self.optimizer, "model_parallel_group"):  # ZeRO reads these at construction
            self.optimizer.model_parallel_group = None
            self.optimizer.model_parallel_world_size = 1
            self.optimizer.model_parallel_rank = 0

    def configure_garbage_collection(self) -> None:
        """As `deepspeed.initialize` does at its end."""
        self._configure_python_gc()

    def _backward_prologue_per_tensor(self, grad: Tensor) -> Tensor:
        return grad  # losses are scaled where they are computed

    def _copy_recovery_script(self, save_path: str) -> None:
        pass  # DeepSpeed's script knows no pipeline stages; `export_hf.py` does

    def _report_progress(self, step: int) -> None:
        pass  # `reports` tells of all stages in one line


@contextmanager
def _no_first_messages() -> Iterator[None]:
    """DeepSpeed's engine opens links of its own by sending a number from each stage to the next.
    They are not used here, and ranks that share a device could not send from it."""

    def nothing(*args: Any) -> None:
        pass

    theirs = pipe_engine.p2p
    pipe_engine.p2p = SimpleNamespace(init_process_groups=nothing, recv=nothing, send=nothing)
    try:
        yield
    finally:
        pipe_engine.p2p = theirs


class _StageLocal:
    """Stands in for the process grid where DeepSpeed would reduce over all stages: there this stage
    is the whole model."""

    def __init__(self, grid: Any) -> None:
        self._of = grid

    def get_model_parallel_group(self) -> Any:
        return self._of.get_slice_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        return self._of.get_slice_parallel_world_size()

    def get_model_parallel_rank(self) -> int:
        return self._of.get_slice_parallel_rank()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def engine_config(ds_config: dict[str, Any], module: PipelineModuleSeam) -> DeepSpeedConfig:
    """DeepSpeed's own view of a config, with what its optimizers need to know of the module."""
    config = DeepSpeedConfig(ds_config, module.grid)
    # the hand-over from bf16 to fp32 gradients must happen in every pass, on every stage: as a hook
    # of the parameters
    config.bfloat16_config.immediate_grad_update = config.bfloat16_config.enabled
    deepspeed.set_optimizer_flags(config, module)
    return config


MUON_PARAMETERS: dict[str, Any] = {
    **dict.fromkeys((*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS)),
    **dict.fromkeys(("lr", "muon_lr", "adam_lr", "momentum", "eps", "weight_decay"), float),
    "per_head_muon": bool,
}
"""What the Muon optimizer reads of a config -> its kind; None for any."""


# --- what the optimizer holds --------------------------------------------------------------------


class Share(NamedTuple):
    """The stretch of a parameter that this rank's optimizer steps."""

    parameter: nn.Parameter
    holder: Tensor  # what is stepped: the parameter itself, or flat fp32 copies of many
    start: int  # first element of the parameter
    offset: int  # where that is in the holder
    length: int


def shares_of(optimizer: Any) -> list[list[Share]]:
    """Of each parameter group, all parameters of the stage; length 0: another replica steps it."""
    names = ("bf16_groups", "fp32_groups_flat_partition")
    if not hasattr(optimizer, names[0]):
        names = ("bit16_groups", "single_partition_of_fp32_groups")
    if not hasattr(optimizer, names[0]):
        return [
            [Share(p, p, 0, 0, p.numel()) for p in group["params"]]
            for group in optimizer.param_groups
        ]
    groups, flats = (getattr(optimizer, name) for name in names)
    return [
        [_share_in(flat, parameter) for parameter in group]
        for group, flat in zip(groups, flats, strict=True)
    ]


def _share_in(flat: Tensor, parameter: Any) -> Share:
    place = parameter._hp_mapping
    if place is None:
        return Share(parameter, flat, 0, 0, 0)
    of_parameter, of_flat = place.lp_fragment_address, place.hp_fragment_address
    return Share(parameter, flat, of_parameter.start, of_flat.start, of_flat.numel)


# --- gradients that are not finite --------------------------------------------------------------


def gradient_of(parameter: Tensor) -> Tensor | None:
    """What has been accumulated in this step, before replicas average: DeepSpeed's bf16 optimizer
    and its ZeRO keep a sum of their own."""
    for name in ("_hp_grad", "grad_accum", "grad"):
        gradient = getattr(parameter, name, None)
        if gradient is not None:
            return gradient.coalesce().values() if gradient.is_sparse else gradient
    return None


def always_check_overflow(optimizer: Any) -> None:
    """`bf16.check_grad_overflow: false` would let a gradient pass that is not finite."""
    if hasattr(optimizer, "check_grad_overflow"):
        optimizer.check_grad_overflow = True


def spoil_gradients(optimizer: Any) -> None:
    """Make DeepSpeed's bf16 or ZeRO optimizer refuse the coming step by its own overflow check: it
    clears its gradients then, and leaves weights and moments alone."""
    averaged = getattr(optimizer, "averaged_gradients", {}).values()
    flat = getattr(optimizer, "fp32_groups_gradients_flat", [])
    for gradient in [g for group in averaged for g in group or () if g is not None] + list(flat):
        gradient.fill_(torch.nan)
