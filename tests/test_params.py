"""params.yaml read: overrides, and refusals that name the field, the value and what is allowed."""

from pathlib import Path

import pytest

from gemst.config import Config, Data
from gemst.errors import GemstError
from gemst.params import load


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text("seed: 3\ntuning: {rank: 16}\n")
    return path


def test_file_over_defaults_and_overrides_over_file(written):
    loaded = load(written, ["tuning.gates.kind=fixed", "tuning.lr=2e-3", "backbone.num_layers=null"])
    assert (loaded.seed, loaded.tuning.rank, loaded.tuning.gates.kind, loaded.tuning.lr) == (3, 16, "fixed", 2e-3)
    assert loaded.data == Data()
    assert load(written, ["tuning.rank=64"]).tuning.rank == 64


@pytest.mark.parametrize(
    "name",
    ["2024-01-01", "2024-01-01 10:00:00", "2024-13-45", "20240101", "12:30", "1:30.5", "010", "0x1f", "0x_", "1_000",
     "2.50", "1e3", "+7", "9" * 5000, "v2"],
)  # fmt: skip
def test_a_name_may_look_like_a_date_or_a_number(written, name):
    assert load(written, [f"registry.run_name={name}"]).registry.run_name == name
    written.write_text(f"registry: {{run_name: {name}}}" if ":" not in name else f"registry:\n  run_name: {name}")
    assert load(written).registry.run_name == name


@pytest.mark.parametrize(
    ("written_as", "value"), [("2.50", 2.5), ("2e-3", 2e-3), ("1.e-1", 0.1), ("+3", 3.0), ("0010", 10.0), ("1_0", 10.0)]
)
def test_a_number_may_be_written_in_many_ways(written, written_as, value):
    assert load(written, [f"tuning.lr={written_as}"]).tuning.lr == value
    assert load(written, [f"tuning.betas=[0.50, {0.9}]"]).tuning.betas == (0.5, 0.9)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tuning.rnk=3", r"tuning\.rnk is not a parameter \(did you mean 'rank'\?\)"),
        ("tuning.gates.zzz=3", r"tuning\.gates\.zzz is not a parameter \(known here: kind, rec, lr\)"),
        ("tunning.rank=3", r"tunning is not a parameter \(did you mean 'tuning'\?\)"),
        ("tuning.rank=0", r"tuning\.rank = 0: .*greater than 0"),
        ("tuning.max_minutes=.inf", r"tuning\.max_minutes = inf: .*finite"),
        ("tuning.rank=many", r"tuning\.rank = 'many': .*integer"),
        ("tuning.method=sgd", r"tuning\.method = 'sgd': .*'gems'"),
        ("tuning.betas=[0.9,1]", r"tuning\.betas\.1 = 1: .*less than 1"),
        ("null_space.energy=1.5", r"null_space\.energy = 1\.5: .*less than or equal to 1"),
        ("tuning.rank", "is not NAME=VALUE"),
        ("=3", "is not NAME=VALUE"),
        ("seed.x=3", "'seed' is a value, not a section"),
    ],
)
def test_refusals_name_field_value_and_what_is_allowed(written, override, said):
    with pytest.raises(GemstError, match=said) as refused:
        load(written, [override])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tuning: [", "is not valid YAML"),
        ("a: !!timestamp 2024-13-45", "is not valid YAML"),
        ("- a", "must hold a mapping"),
        ("tuning: 3", r"tuning = 3: "),
    ],
)
def test_a_broken_file_is_one_line(written, text, said):
    written.write_text(text)
    with pytest.raises(GemstError, match=said) as refused:
        load(written)
    assert "\n" not in str(refused.value)


def test_missing_and_empty_file(written, tmp_path):
    with pytest.raises(GemstError, match=r"none\.yaml is no file"):
        load(tmp_path / "none.yaml")
    written.write_text("")
    assert load(written) == Config()


def test_what_does_not_go_together_is_said_without_the_tree(written):
    with pytest.raises(GemstError) as refused:
        load(written, ["evaluation.protocols=[shown]", "data.negatives=uniform"])
    assert str(refused.value).endswith(
        "params.yaml: evaluation.protocols: shown needs data.negatives: shown, not uniform"
    )
