"""LoRA and DoRA adapters of peft on the same Linears."""

from __future__ import annotations

from gemst.config import Config
from gemst.tuning.methods.plain import PlainMethod
from gemst.tuning.model import ItemModel
from gemst.tuning.subspace import matching


class LoraMethod(PlainMethod):
    """Low-rank adapters (Hu et al. 2021; DoRA, Liu et al. 2024), merged into the weights at the end. alpha = 2 r."""

    def __init__(self, config: Config, items: ItemModel) -> None:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        tuning = config.tuning
        settings = LoraConfig(
            r=tuning.rank,
            lora_alpha=2 * tuning.rank,
            lora_dropout=0.0,
            target_modules=list(matching(items.model, tuning.modules)),
            use_dora=tuning.adapter == "dora",
        )
        self.tuner = LoraModel(items.model, settings, "default")
        super().__init__(config, items, {n: p for n, p in items.model.named_parameters() if "lora_" in n})

    def finish(self) -> None:
        self.tuner.merge_and_unload()
