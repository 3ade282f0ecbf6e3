"""Full fine-tuning of the same Linears: AdamW, GaLore's projected AdamW, and gradient surgery over two tasks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gemst.config import Config
from gemst.tuning.batches import Batch
from gemst.tuning.methods.plain import PlainMethod
from gemst.tuning.model import ItemModel
from gemst.tuning.subspace import matching


class FullMethod(PlainMethod):
    """AdamW on every matching Linear's weight: the method to beat."""

    def __init__(self, config: Config, items: ItemModel, shard: Callable[[ItemModel], None]) -> None:
        modules = matching(items.model, config.tuning.modules)
        for module in modules.values():
            module.get_parameter("weight").requires_grad_(True)
        shard(items)
        super().__init__(config, items, {name: module.get_parameter("weight") for name, module in modules.items()})


class GaloreMethod(FullMethod):
    """GaLore (Zhao et al. 2024, the galore-torch package): AdamW on gradients projected to rank `tuning.rank`."""

    def _optimizer(self) -> torch.optim.Optimizer:
        from galore_torch import GaLoreAdamW
        from galore_torch.galore_projector import GaLoreProjector

        torch.serialization.add_safe_globals([GaLoreProjector])  # it lies in the state that a resumed run loads
        tuning = self.tuning
        low, rows = self._groups()
        low |= {"rank": tuning.rank, "update_proj_gap": tuning.refresh_every, "scale": tuning.scale, "proj_type": "std"}
        optimizer: torch.optim.Optimizer = GaLoreAdamW([low, rows], betas=tuning.betas, no_deprecation_warning=True)
        optimizer.register_load_state_dict_post_hook(_projectors_home)
        return optimizer


def _projectors_home(optimizer: torch.optim.Optimizer) -> None:
    """Loading a state moves its tensors to their parameter's device, but not those inside GaLore's projectors."""
    for parameter, state in optimizer.state.items():
        if "projector" in state:
            state["projector"].ortho_matrix = state["projector"].ortho_matrix.to(parameter.device)


class SurgeryMethod(FullMethod):
    """AdamW on one gradient made from both tasks' by PCGrad (Yu et al. 2020) or UPGrad (torchjd)."""

    def __init__(self, config: Config, items: ItemModel, shard: Callable[[ItemModel], None]) -> None:
        from torchjd.aggregation import PCGrad, UPGrad

        super().__init__(config, items, shard)
        self.aggregator = {"pcgrad": PCGrad, "upgrad": UPGrad}[config.tuning.method]()
        self.conflict = False

    def prepare(self, targets: tuple[int, int], observe: bool) -> None:
        self.conflict = all(targets)  # one task alone has nothing to conflict with

    def backward(self, losses: Tensor, batch: Batch) -> None:
        from torchjd.autojac import backward

        if not self.conflict:
            losses.sum().backward()
            return
        rec = batch.targets[0]  # a batch may lack a task that the step has: its loss here is 0, and so is its gradient
        backward([losses[:rec].sum(), losses[rec:].sum()], inputs=self.parameters(), parallel_chunk_size=1)

    def merge(self) -> None:
        """Turn the tasks' gradients, gathered over the step's batches, into one."""
        from torchjd.autojac import jac_to_grad

        waiting = [p for p in self.parameters() if getattr(p, "jac", None) is not None]
        if waiting:
            jac_to_grad(waiting, self.aggregator, optimize_gramian_computation=True)
