"""Builds and generations: unique, stable, complete on disk, and clear when they cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from gemst import item_ids
from gemst.config import Config
from gemst.errors import GemstError

STRATEGIES = ["atomic", "rq-kmeans", "rq-vae", "joint", "joint shared-specific"]


def catalogue(n: int = 120) -> pl.DataFrame:
    """Items in six themes, with vectors; the last three are copies of the first."""
    rng = np.random.default_rng(0)
    vectors = 2 * rng.standard_normal((6, 12))[np.arange(n) % 6] + rng.standard_normal((n, 12))
    vectors[-3:] = vectors[0]
    return pl.DataFrame(
        {
            "item_id": [f"i{row}" for row in range(n)], "title": [f"title {row}" for row in range(n)],
            "text": [None] * n,
            "categories": [[f"theme {row % 6}"] for row in range(n)], "embedding": vectors.tolist(),
        },
        schema_overrides={"text": pl.String},
    )  # fmt: skip


def behaviour(n: int = 120) -> pl.DataFrame:
    """Train examples of users who stay within a theme; the last ten items are never met."""
    rng = np.random.default_rng(1)
    themes = np.repeat(rng.integers(0, 6, 40), 15)
    picked = np.minimum(rng.integers(0, n // 6, 600) * 6 + themes, n - 11)
    query = [f"theme {theme}" if row % 3 == 0 else None for row, theme in enumerate(themes)]
    return pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(40), 15).astype(str),
            "query": query,
            "targets": [[f"i{item}"] for item in picked],
        }
    )


def configured(strategy: str, **more: object) -> Config:
    name, *variant = strategy.split()
    settings = {"strategy": name, "levels": 3, "codebook_size": 8, "embedding": "column", "epochs": 40, **more}
    return Config.model_validate({"item_ids": settings | ({"joint": variant[0]} if variant else {})})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_item_gets_its_own_id_and_the_folder_gives_it_back(strategy: str, tmp_path: Path) -> None:
    items = catalogue()
    quality = item_ids.build(items, behaviour(), configured(strategy), tmp_path / "ids")
    ids = item_ids.load(tmp_path / "ids")
    assert ids.item_id == items["item_id"].to_list()
    assert len(np.unique(ids.codes, axis=0)) == len(items)
    assert quality == json.loads((tmp_path / "ids/quality.json").read_text())
    assert quality["unique_ratio_after"] == 1.0
    assert [level["dead"] for level in quality["levels"]] == [0] * len(ids.level_sizes)
    assert (quality["collisions_before"] > 0) == (strategy != "atomic")  # four equal vectors collide
    assert len(set(ids.tokens)) == len(ids.tokens) == sum(ids.level_sizes)
    assert (tmp_path / "ids/quality.png").stat().st_size > 1000
    spelled = {"".join(np.array(ids.tokens)[row]) for row in ids.token_ids(0)}
    assert len(spelled) == len(items)
    table = pl.read_parquet(tmp_path / "ids/ids.parquet")  # the map, in both directions
    assert set(table["tokens"]) == spelled
    to_item = dict(table.select("tokens", "item_id").iter_rows())
    assert to_item["".join(np.array(ids.tokens)[ids.token_ids(0)[17]])] == "i17"
    assert sorted(ids.trie.items.tolist()) == list(range(len(items)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_inputs_give_equal_builds(strategy: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        item_ids.build(catalogue(), behaviour(), configured(strategy), tmp_path / name)
    for file in ("ids.parquet", "quality.json", "trie.safetensors", "manifest.json", "quality.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_generation_moves_nothing_retires_without_reuse_and_takes_back_its_own(strategy: str, tmp_path: Path) -> None:
    items = catalogue()
    item_ids.build(items[:100], behaviour(), configured(strategy), tmp_path / "g0")
    gone = items.filter(~pl.col("item_id").is_in(["i3", "i50"])).sample(fraction=1.0, shuffle=True, seed=1)
    item_ids.build(gone, behaviour(), configured(strategy, extends=tmp_path / "g0"), tmp_path / "g1")
    item_ids.build(items, behaviour(), configured(strategy, extends=tmp_path / "g1"), tmp_path / "g2")
    first, second, third = (item_ids.load(tmp_path / name) for name in ("g0", "g1", "g2"))
    assert second.item_id[:100] == first.item_id
    assert (second.codes[:100] == first.codes).all()
    assert len(np.unique(second.codes, axis=0)) == 120
    assert second.generation.tolist() == [0] * 100 + [1] * 20
    assert [second.item_id[row] for row in np.flatnonzero(~second.active)] == ["i3", "i50"]
    assert set(second.trie.items.tolist()) == set(np.flatnonzero(second.active).tolist())
    assert third.item_id == second.item_id
    assert (third.codes == second.codes).all()
    assert third.active.all()


def test_other_settings_cannot_extend_a_build(tmp_path: Path) -> None:
    item_ids.build(catalogue(), behaviour(), configured("rq-kmeans"), tmp_path / "g0")
    with pytest.raises(GemstError, match="built with codebook_size = 8, not 9"):
        item_ids.build(
            catalogue(), behaviour(), configured("rq-kmeans", codebook_size=9, extends=tmp_path / "g0"), tmp_path / "g1"
        )
    assert not (tmp_path / "g1").exists()
    with pytest.raises(GemstError, match="built with strategy = 'rq-kmeans', not 'atomic'"):
        item_ids.build(catalogue(), behaviour(), configured("atomic", extends=tmp_path / "g0"), tmp_path / "g1")


def test_joint_ids_follow_behaviour_where_text_says_nothing(tmp_path: Path) -> None:
    flat = catalogue().with_columns(embedding=pl.Series(np.random.default_rng(5).standard_normal((120, 12)).tolist()))
    item_ids.build(flat, behaviour(), configured("joint", text_weight=0.05, levels=3), tmp_path / "ids")
    ids = item_ids.load(tmp_path / "ids")
    met = np.arange(90)
    same_theme = (met[:, None] - met) % 6 == 0
    same_bucket = ids.codes[met, 0][:, None] == ids.codes[met, 0]
    np.fill_diagonal(same_bucket, False)
    assert same_bucket[same_theme].mean() > 3 * same_bucket[~same_theme].mean()


def test_shared_specific_levels_look_at_one_side_each(tmp_path: Path) -> None:
    from gemst.item_ids.semantic import Quantizer

    item_ids.build(catalogue(), behaviour(), configured("joint shared-specific"), tmp_path / "ids")
    shared, text, company = Quantizer.load(tmp_path / "ids/quantizer.safetensors").codebooks
    assert shared[:, :12].any()
    assert shared[:, 12:].any()
    assert text[:, :12].any()
    assert not text[:, 12:].any()
    assert not company[:, :12].any()
    assert company[:, 12:].any()


def test_too_many_items_name_the_fields_to_raise(tmp_path: Path) -> None:
    with pytest.raises(
        GemstError, match=r"120 items do not fit item_ids.levels = 2 of item_ids.codebook_size = 8 \(64 IDs\)"
    ):
        item_ids.build(catalogue(), behaviour(), configured("rq-kmeans", levels=2), tmp_path / "ids")


def test_a_full_space_of_published_ids_needs_new_ones(tmp_path: Path) -> None:
    """The settings of an extension are those of its build: to raise them there is no way out."""
    item_ids.build(catalogue(64), behaviour(64), configured("rq-kmeans", levels=2), tmp_path / "g0")
    settings = configured("rq-kmeans", levels=2, extends=tmp_path / "g0")
    with pytest.raises(
        GemstError, match=r"65 items .*never move and 3 of them are retired: .*extends: null.*tune again"
    ):
        item_ids.build(catalogue(65)[3:], behaviour(), settings, tmp_path / "g1")


def test_a_full_code_space_still_works(tmp_path: Path) -> None:
    quality = item_ids.build(catalogue(64), behaviour(), configured("rq-kmeans", levels=2), tmp_path / "ids")
    assert quality["unique_ratio_after"] == 1.0


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (pl.lit(None, dtype=pl.List(pl.Float64)), "different lengths or nulls"),
        (pl.lit(pl.Series([[float("nan"), 1.0]])).first(), "null, infinite or all-zero"),
    ],
)
def test_a_bad_embedding_column_is_named(change: pl.Expr, cause: str, tmp_path: Path) -> None:
    with pytest.raises(GemstError, match=cause):
        item_ids.build(
            catalogue().with_columns(embedding=change), behaviour(), configured("rq-kmeans"), tmp_path / "ids"
        )


def test_an_empty_catalogue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GemstError, match="no items"):
        item_ids.build(catalogue().clear(), behaviour(), configured("atomic"), tmp_path / "ids")


def test_a_table_that_was_changed_after_the_build_is_refused(tmp_path: Path) -> None:
    item_ids.build(catalogue(), behaviour(), configured("atomic"), tmp_path / "ids")
    frame = pl.read_parquet(tmp_path / "ids/ids.parquet")
    frame[::-1].write_parquet(tmp_path / "ids/ids.parquet")
    with pytest.raises(GemstError, match=r"ids.parquet is not the file its manifest.json was written for"):
        item_ids.load(tmp_path / "ids")


def test_the_trie_of_another_build_is_refused(tmp_path: Path) -> None:
    for name, size in (("a", 60), ("b", 120)):
        item_ids.build(catalogue(size), behaviour(60), configured("rq-kmeans"), tmp_path / name)
    (tmp_path / "a/trie.safetensors").write_bytes((tmp_path / "b/trie.safetensors").read_bytes())
    with pytest.raises(GemstError, match=r"trie.safetensors is not the file its manifest.json was written for"):
        item_ids.load(tmp_path / "a")


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_an_item_appended_alone_lands_beside_its_like(strategy: str, tmp_path: Path) -> None:
    items, asked = catalogue(), list(range(110, 117))  # nobody has met these, so a copy is all they are
    item_ids.build(items, behaviour(), configured(strategy), tmp_path / "g0")
    published = item_ids.load(tmp_path / "g0").codes[:, 0]
    landed = []
    for row in asked:
        copy = items[row].with_columns(item_id=pl.lit("copy"))
        settings = configured(strategy, extends=tmp_path / "g0")
        item_ids.build(pl.concat([items, copy]), behaviour(), settings, tmp_path / f"g{row}")
        landed.append(item_ids.load(tmp_path / f"g{row}").codes[-1, 0])
    # The first level was learned within a bound on its buckets, so one or two may have been turned away from theirs.
    assert np.mean(published[asked] == landed) > 0.6


def test_the_first_level_of_k_means_is_balanced(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((120, 12)) * 0.01 + np.ones(12)  # nine tenths in one heap
    vectors[::10] = -np.random.default_rng(1).standard_normal((12, 12))
    heavy = catalogue().with_columns(embedding=pl.Series(vectors.tolist()))
    item_ids.build(heavy, behaviour(), configured("rq-kmeans"), tmp_path / "ids")
    assert np.bincount(item_ids.load(tmp_path / "ids").codes[:, 0]).max() <= -(-120 * 5 // (4 * 8))


def test_vectors_of_another_width_cannot_extend_a_build(tmp_path: Path) -> None:
    for strategy in ("rq-kmeans", "rq-vae", "joint"):
        item_ids.build(catalogue()[:100], behaviour(100), configured(strategy), tmp_path / strategy)
        wide = catalogue().with_columns(embedding=pl.col("embedding").list.concat([1.0]))
        with pytest.raises(GemstError, match=r"have 13 numbers, those of the build in item_ids.extends 12"):
            item_ids.build(wide, behaviour(), configured(strategy, extends=tmp_path / strategy), tmp_path / "no")


def test_the_encoder_does_not_matter_where_vectors_are_a_column(tmp_path: Path) -> None:
    item_ids.build(catalogue()[:100], behaviour(100), configured("rq-kmeans", encoder="one"), tmp_path / "g0")
    settings = configured("rq-kmeans", encoder="other", extends=tmp_path / "g0")
    assert item_ids.build(catalogue(), behaviour(), settings, tmp_path / "g1")["unique_ratio_after"] == 1.0


def test_joint_ids_of_a_log_that_tells_nobody_apart_follow_text(tmp_path: Path) -> None:
    one = pl.DataFrame({"user_id": ["u", "u"], "query": ["a", "a"], "targets": [["i0"], ["i0"]]})
    quality = item_ids.build(catalogue(), one, configured("joint"), tmp_path / "ids")
    assert quality["unique_ratio_after"] == 1.0


def test_shared_and_specific_levels_need_three() -> None:
    with pytest.raises(ValueError, match=r"shared-specific needs item_ids.levels of 3 or more"):
        configured("joint shared-specific", levels=2)


def test_a_folder_without_a_manifest_is_no_build(tmp_path: Path) -> None:
    item_ids.build(catalogue(), behaviour(), configured("atomic"), tmp_path / "ids")
    (tmp_path / "ids/manifest.json").unlink()
    with pytest.raises(GemstError, match="gemst tokenize"):
        item_ids.load(tmp_path / "ids")
    with pytest.raises(GemstError, match=r"extends = .* is no published build"):
        item_ids.build(catalogue(), behaviour(), configured("atomic", extends=tmp_path / "ids"), tmp_path / "g1")
