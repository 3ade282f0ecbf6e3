"""Adapters of peft on the same Linears: LoRA, DoRA, OSF."""

from __future__ import annotations

import re
from typing import Any

from gemst.config import Config
from gemst.errors import GemstError
from gemst.tuning.methods.plain import PlainMethod
from gemst.tuning.model import ItemModel
from gemst.tuning.subspace import matching


class LoraMethod(PlainMethod):
    """Adapters that are merged into the weights at the end, `tuning.adapter` says which.

    lora: low-rank adapters (Hu et al. 2021), alpha = 2 r; dora: with a trained magnitude (Liu et al. 2024); osf:
    orthogonal subspace fine-tuning (Nayak et al. 2025), which trains the `tuning.rank` least singular directions of
    each weight. Raises GemstError when a layer cannot carry the adapter.
    """

    def __init__(self, config: Config, items: ItemModel) -> None:
        modules = matching(items.model, config.tuning.modules)
        rank, marker = config.tuning.rank, "osf_svd_params" if config.tuning.adapter == "osf" else "lora_"
        if config.tuning.adapter == "osf":
            self.tuner: Any = _osf(items, {n: min(m.get_parameter("weight").shape) for n, m in modules.items()}, rank)
        else:
            self.tuner = _lora(items, list(modules), rank, dora=config.tuning.adapter == "dora")
        named = {name: parameter for name, parameter in items.model.named_parameters() if marker in name}
        for name in modules:
            if not any(parameter.startswith(f"{name}.") for parameter in named):
                raise GemstError(
                    f"peft puts no {config.tuning.adapter} adapter on {name}",
                    "Use tuning.adapter: lora for this backbone",
                )
        super().__init__(config, items, named)

    def finish(self) -> None:
        self.tuner.merge_and_unload()


def _lora(items: ItemModel, names: list[str], rank: int, dora: bool) -> Any:
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    settings = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=names, use_dora=dora)
    return LoraModel(items.model, settings, "default")


def _osf(items: ItemModel, widths: dict[str, int], rank: int) -> Any:
    """peft counts the directions that stay; `widths` are the lesser dimension of each weight."""
    from peft.tuners.osf import OSFConfig, OSFModel

    for name, width in widths.items():
        if rank >= width:
            raise GemstError(f"tuning.rank = {rank} leaves {name} no direction to keep", f"Set it below {width}")
    kept: dict[str, int | float] = {f"^{re.escape(name)}$": width - rank for name, width in widths.items()}
    return OSFModel(items.model, OSFConfig(target_modules=list(widths), rank_pattern=kept), "default")
