"""The recipe of docs/tuning.md for transformers.Trainer, run as it stands there."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from gemst.config import Gates, Tuning
from gemst.tuning.gates import Gate
from gemst.tuning.optimizer import Gems
from gemst.tuning.subspace import SubspaceLinear, attach
from tests.tuning.conftest import llama

ROOT = Path(__file__).resolve().parents[2]


def test_the_documented_lines_tune_inside_the_trainer(tmp_path: Path) -> None:
    section = (ROOT / "docs" / "tuning.md").read_text().split("## Inside transformers.Trainer")[1]
    recipe = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert recipe
    model = llama()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plain = [type(module).__name__ for module in model.modules()]
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(24):
        ids = torch.randint(3, 20, (7,), generator=generator)
        ids[-1] = 5 if number % 3 else 9  # both tasks have an answer to learn
        rows.append(
            {"input_ids": ids, "labels": torch.where(torch.arange(7) == 6, ids, -100), "search": number % 3 == 0}
        )
    arguments = TrainingArguments(
        str(tmp_path), remove_unused_columns=False, per_device_train_batch_size=6, num_train_epochs=15,
        report_to="none", save_strategy="no", logging_steps=1, learning_rate=2e-3, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    history: list[float] = []

    class Observed(Trainer):
        def log(self, logs, *args, **kwargs):
            history.extend(value for name, value in logs.items() if name == "loss")

    names = {
        "attach": attach, "Tuning": Tuning, "Gems": partial(Gems, weight_decay=0.1), "Gate": Gate, "Gates": Gates,
        "Trainer": Observed, "model": model, "default_data_collator": default_data_collator,
        "arguments": arguments, "rows": rows,
    }  # fmt: skip
    exec(recipe.group(1), names)
    assert sum(history[-4:]) < 0.9 * sum(history[:4])
    assert [type(module).__name__ for module in model.modules()] == plain
    assert not any(isinstance(module, SubspaceLinear) for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("proj" not in name), name
    gems = names["gems"]
    assert gems.skipped == 0
    assert gems.param_groups[0]["steps"] == 15 * 4 - 1
    assert not any(gems.param_groups[0]["shrunk"])  # no decay is lost with the layers
