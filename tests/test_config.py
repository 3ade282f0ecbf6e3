"""The one typed tree of parameters."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from gemst import config
from gemst.errors import GemstError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text("seed: 3\ntuning: {rank: 16}\n")
    return path


def test_file_over_defaults_and_overrides_over_file(params):
    loaded = config.load(params, ["tuning.gates.kind=fixed", "tuning.lr=2e-3", "backbone.num_layers=null"])
    assert (loaded.seed, loaded.tuning.rank, loaded.tuning.gates.kind, loaded.tuning.lr) == (3, 16, "fixed", 2e-3)
    assert loaded.data == config.Data()
    assert config.load(params, ["tuning.rank=64"]).tuning.rank == 64


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tuning.rnk=3", r"tuning\.rnk is not a parameter \(did you mean 'rank'\?\)"),
        ("tuning.gates.zzz=3", r"tuning\.gates\.zzz is not a parameter \(known here: kind, rec, lr\)"),
        ("tunning.rank=3", r"tunning is not a parameter \(did you mean 'tuning'\?\)"),
        ("tuning.rank=0", r"tuning\.rank = 0: .*greater than 0"),
        ("tuning.rank=many", r"tuning\.rank = 'many': .*integer"),
        ("tuning.method=sgd", r"tuning\.method = 'sgd': .*'gems'"),
        ("null_space.energy=1.5", r"null_space\.energy = 1\.5: .*less than or equal to 1"),
        ("tuning.rank", "is not NAME=VALUE"),
        ("=3", "is not NAME=VALUE"),
        ("seed.x=3", "'seed' is a value, not a section"),
    ],
)
def test_refusals_name_field_value_and_what_is_allowed(params, override, said):
    with pytest.raises(GemstError, match=said) as refused:
        config.load(params, [override])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [("tuning: [", "is not valid YAML"), ("- a", "must hold a mapping"), ("tuning: 3", r"tuning = 3: ")],
)
def test_a_broken_file_is_one_line(params, text, said):
    params.write_text(text)
    with pytest.raises(GemstError, match=said) as refused:
        config.load(params)
    assert "\n" not in str(refused.value)


def test_missing_and_empty_file(params, tmp_path):
    with pytest.raises(GemstError, match=r"none\.yaml is no file"):
        config.load(tmp_path / "none.yaml")
    params.write_text("")
    assert config.load(params) == config.Config()


def test_what_does_not_go_together_is_said_without_the_tree(params):
    with pytest.raises(GemstError) as refused:
        config.load(params, ["evaluation.protocols=[shown]", "data.negatives=uniform"])
    assert str(refused.value).endswith(
        "params.yaml: evaluation.protocols: shown needs data.negatives: shown, not uniform"
    )


def test_the_tree_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        config.Config().tuning.rank = 3  # type: ignore[misc]


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
    loaded = config.load(path)
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
        tuning = config.load(ROOT / f"configs/{name}.yaml").tuning
        assert (tuning.rank, tuning.lr, tuning.epochs, tuning.weight_decay, tuning.refresh_every) == (
            768,
            5e-4,
            50,
            0.01,
            200,
        )
    qilin = config.load(ROOT / "configs/paper-qilin.yaml")
    assert (qilin.backbone.name, qilin.data.core, qilin.null_space.threshold) == ("google-t5/t5-base", 3, 2e-2)
    assert config.load(ROOT / "configs/paper-amazon-electronics.yaml").data.min_history == 5
