"""Everything about process groups: which process this is, what is summed over all, what is kept in shards.

A run is one process, or several that `torchrun` or `accelerate launch` started. Each takes its rows of every batch;
gradients are means over the processes (of losses that are scaled to make those means the step's gradient). Under `ddp`
every process holds the whole model, under `fsdp` the rows of each weight and of its coefficients lie on one process
each. The functions below do nothing in a run of one process.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from gemst.errors import GemstError

if TYPE_CHECKING:
    from gemst.config import Tuning
    from gemst.tuning.model import ItemModel

T = TypeVar("T")


def world() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if world() > 1 else 0


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds, as a view; any other tensor is returned as it is."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together on every process; any other tensor is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole `tensor`, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def mean_(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its mean over the processes."""
    if world() > 1:
        dist.all_reduce(tensor)
        tensor /= world()
    return tensor


def from_first_(tensor: Tensor) -> Tensor:
    """Replace `tensor` by that of process 0."""
    if world() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def over_shards(value: Tensor, of: Tensor) -> Tensor:
    """Sum of what each process found in its part `of` a sharded tensor; `value` where every process has all of it."""
    if world() > 1 and isinstance(of, DTensor):
        dist.all_reduce(value)
    return value


def everywhere(flag: Tensor) -> bool:
    """True when the boolean scalar `flag` is true on every process."""
    if world() > 1:
        flag = flag.int()
        dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def on_first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors by name, on the CPU of process 0 alone; sharded ones are put together one at a time.

    What is whole and on the CPU already is not copied.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if rank() == 0:
            gathered[name] = full.cpu()
    return gathered


def _check(tuning: Tuning) -> None:
    """Raise GemstError for what several processes cannot run together."""
    # Several backward passes, or some past the hooks that reduce gradients.
    alone = {"method": tuning.method in ("pcgrad", "upgrad"), "fidelity": tuning.fidelity != "default"}
    # Other optimizers are wrong on rows of a matrix, and these weights have two halves.
    whole_only = {"method": tuning.method not in ("gems", "full"), "precision": tuning.precision == "bf16-weights"}
    for name, refused in alone.items():
        if refused:
            raise GemstError(f"tuning.{name} = {getattr(tuning, name)} runs in one process", "Start without torchrun")
    for name, refused in whole_only.items():
        if refused and tuning.distributed == "fsdp":
            raise GemstError(
                f"tuning.{name} = {getattr(tuning, name)} cannot be sharded", "Set tuning.distributed to ddp for it"
            )


class Processes:
    """The processes of a run and its device; joins the group that the launcher's environment names.

    Raises GemstError when `tuning`, if that is what they are for, cannot be run by several.
    """

    def __init__(self, tuning: Tuning | None = None) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        # Bases are buffers that all processes compute alike; precision is tuning.precision, not the launcher's.
        wrapper = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[wrapper]
        )
        device: torch.device = self.accelerator.device
        self.device = device if device.type == "cuda" else torch.device("cpu")  # never cpu:0, which is another device
        self.count, self.rank = world(), rank()
        self.first = self.rank == 0
        self.sharded = tuning is not None and tuning.distributed == "fsdp" and self.count > 1
        if tuning is not None and self.count > 1:
            _check(tuning)

    def shares(self, rows: Any) -> list[Any]:
        """What each process makes of a batch's rows: every count-th of them, so that each gets both tasks.

        A process without a row gets None.
        """
        return [rows[number :: self.count] if number < len(rows) else None for number in range(self.count)]

    def shard(self, items: ItemModel) -> None:
        """Under `fsdp`, leave this process its rows of every parameter. Call it before an optimizer sees them."""
        if not self.sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        from gemst.tuning.subspace import SubspaceLinear

        mesh = init_device_mesh(self.device.type, (self.count,))
        layers = [module for module in items.modules() if isinstance(module, SubspaceLinear)]
        columns = {id(layer.weight) for layer in layers if layer.transposed}  # Conv1D keeps W^T: out is dimension 1
        kinds = set(items.model._no_split_modules or ())
        blocks = [module for module in items.modules() if type(module).__name__ in kinds]
        for module in [*blocks, items]:
            fully_shard(module, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if id(p) in columns else Shard(0))
        for module in items.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no mean
        for layer in layers:
            layer.keeps_copies = False

    def wrap(self, items: ItemModel) -> nn.Module:
        """What to call for losses: it takes part in the gradient reduction of all processes."""
        if self.count == 1 or self.sharded:
            return items
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # accelerate knows broadcast_buffers by its old name only
            model: nn.Module = self.accelerator.prepare_model(items, device_placement=False)
        return model

    def reducing(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a batch: gradients go over the wire with the step's last batch alone."""
        if self.sharded:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(model)

    def totals(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, as exact as float64."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gathered(self, value: T) -> list[T]:
        """Every process's `value`, on all of them."""
        if self.count == 1:
            return [value]
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, value)
        return everyone

    def agreed(self, value: T) -> T:
        """What process 0 has decided, on all of them."""
        if self.count == 1:
            return value
        decided: list[Any] = [value]
        dist.broadcast_object_list(decided, 0, device=self.device)
        return decided[0]

    @contextmanager
    def unsharded(self, items: ItemModel) -> Iterator[None]:
        """Under `fsdp`, the whole model on every process, for forward passes that the processes make out of step."""
        if not self.sharded:
            yield
            return
        from torch.distributed.fsdp import FSDPModule

        modules = [module for module in items.modules() if isinstance(module, FSDPModule)]
        modules[0]._get_fsdp_state()._lazy_init()  # a part that runs before the whole ever did would become a root
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(module is not modules[0], recurse=False)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the group; after an error at once, for the others may never arrive."""
        self.accelerator.end_training()
