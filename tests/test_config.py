"""The one typed tree of parameters."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from gemst import config
from gemst.params import load

ROOT = Path(__file__).resolve().parents[1]


def test_the_tree_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        config.Config().tuning.rank = 3  # type: ignore[misc]


def test_a_learned_gate_wants_two_tasks():
    with pytest.raises(ValidationError, match=r"a learned gate compares two tasks; use gates\.kind: heuristic"):
        config.Config.model_validate({"tuning": {"tasks": "search", "gates": {"kind": "learned"}}})


def test_flat_names_round_trip():
    tree = config.Config()
    flat = tree.flat()
    assert flat["tuning.gates.kind"] == "heuristic"
    rebuilt: dict = {}
    for name, value in flat.items():
        node = rebuilt
        *sections, leaf = name.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    assert config.Config.model_validate(rebuilt) == tree


def test_demo_preset_is_the_default_byte_for_byte():
    assert (ROOT / "configs/demo.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


PRESETS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if not path.stem.startswith("study")]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid_and_name_every_parameter(path):
    loaded = load(path)
    written = yaml.safe_load(path.read_text())
    missing = [name for name in loaded.flat() if not _has(written, name.split("."))]
    assert not missing  # DVC reads this file too, and knows no defaults


def _has(tree: object, parts: list[str]) -> bool:
    for part in parts:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def test_paper_presets_carry_the_released_settings():
    for name in ("paper-qilin", "paper-amazon-electronics"):
        tuning = load(ROOT / f"configs/{name}.yaml").tuning
        assert (tuning.rank, tuning.lr, tuning.epochs, tuning.weight_decay, tuning.refresh_every) == (
            768,
            5e-4,
            50,
            0.01,
            200,
        )
    qilin = load(ROOT / "configs/paper-qilin.yaml")
    assert (qilin.backbone.name, qilin.data.core, qilin.null_space.threshold) == ("google-t5/t5-base", 3, 2e-2)
    assert load(ROOT / "configs/paper-amazon-electronics.yaml").data.min_history == 5
