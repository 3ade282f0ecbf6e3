"""The report says what was measured, survives what is missing, and carries user text as text."""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest

from gemst.evaluation import report
from gemst.evaluation.examples import worked
from gemst.evaluation.run import Evaluation
from gemst.memory.evidence import ALONE, Fit

ITEMS = pl.DataFrame(
    {"item_id": [f"i{n}" for n in range(30)], "title": [f"Film {n}" for n in range(29)] + ["<b>Bold</b> & co"]}
)
NOTHING = Path("no/such/file.parquet")


def metrics() -> dict[str, Any]:
    def ranker(rec: float, src: float) -> dict[str, Any]:
        names = ("ndcg@10", "hit@10", "mrr@10", "map@10")
        return {
            "recommendation": dict.fromkeys(names, rec), "search": dict.fromkeys(names, src),
            "joint": 2 / (1 / rec + 1 / src),
        }  # fmt: skip

    def paired(difference: float) -> dict[str, Any]:
        line = {
            "difference": difference, "difference_low": difference - 0.01, "difference_high": difference + 0.01,
            "ratio": 1.1, "p": 0.5,
        }  # fmt: skip
        return dict.fromkeys(("recommendation", "search", "joint"), line)

    both = {"model": {"recommendation": {"ndcg@10": 0.1, "queries": 12}, "search": {"ndcg@10": 0.2, "queries": 12}}}
    return {
        "model": ranker(0.1234, 0.25), "references": {"popularity": ranker(0.05, 0.04), "lookup": ranker(0.05, 0.3)},
        "intervals": {"model": {"recommendation": [0.11, 0.14], "search": [0.2, 0.3]}},
        "paired": {"popularity": paired(0.07), "lookup": paired(-0.05)},
        "slices": {
            "history": {"0-5": both, "11-20": both},
            "query": {"unseen": {"model": {"search": both["model"]["search"]}}},
        },
        "protocols": {"uniform99": {"model": ranker(0.5, 0.6), "references": {"popularity": ranker(0.3, 0.3)}}},
        "drift": {
            "perplexity_before": 57.75, "perplexity_after": 57.9, "rise": 0.0026, "kl": 0.0012, "item_mass": 0.001,
            "cloze_before": 0.7, "cloze_after": 0.69, "cloze_questions": 200.0, "tokens": 5000.0,
        },
        "counts": {"items": 30, "test": 24}, "seconds": {"model": 1.5},
    }  # fmt: skip


def examples() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "user_id": [f"u{n}" for n in range(24)],
            "task": ["recommendation", "search"] * 12,
            "query": [None, "<script>alert('q')</script>"] * 12,
            "history": [[f"i{n % 5}", "gone", "i29"] for n in range(24)],
            "targets": [[f"i{n}"] for n in range(24)],
            "timestamp": [datetime(2024, 1, 1, tzinfo=UTC)] * 24,
        }
    )


def rankings() -> pl.DataFrame:
    """Every example gets items 0 to 11 in order."""
    lines = [(row, f"i{rank - 1}", rank, -float(rank)) for row in range(24) for rank in range(1, 13)]
    schema = {"row": pl.UInt32, "item_id": pl.String, "rank": pl.UInt16, "score": pl.Float32}
    return pl.DataFrame(lines, schema=schema, orient="row")


@pytest.fixture
def result() -> Evaluation:
    return Evaluation(metrics(), pl.DataFrame(), rankings())


@pytest.fixture
def logs(tmp_path: Path) -> tuple[Path, Path]:
    steps = np.arange(1, 101)
    names = ("train/loss_rec", "train/loss_src", "gate/rec", "valid/joint", "lr", "tokens_per_s", "train/gradient_norm")
    curves = pl.concat(pl.DataFrame({"step": steps, "name": name, "value": np.cos(steps / 9)}) for name in names)
    lines = [
        {
            "step": step, "module": f"model.layers.{layer}.mlp.{kind}", "cosine": 0.1 * layer, "energy_shared": 0.9,
            "energy_rec": float("nan"), "leak": 2.5e-7,
        }
        for step in (1, 21) for layer in range(3) for kind in ("up_proj", "down_proj")
    ]  # fmt: skip
    curves.write_parquet(tmp_path / "curves.parquet")
    pl.DataFrame(lines).write_parquet(tmp_path / "diagnostics.parquet")
    return tmp_path / "curves.parquet", tmp_path / "diagnostics.parquet"


class Page(HTMLParser):
    """Collects text, sections and figures, and sees that every element is closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.sections: list[str] = []
        self.images: dict[str, str] = {}
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "section":
            self.sections.append(str(found["id"]))
        if tag == "img":
            self.images[str(found["alt"])] = str(found["src"])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def made(result: Evaluation, curves: Path = NOTHING, diagnostics: Path = NOTHING) -> str:
    return report.html(result, items=ITEMS, test=examples(), curves=curves, diagnostics=diagnostics)


def test_a_whole_report_has_every_part_and_is_self_contained(result: Evaluation, logs: tuple[Path, Path]) -> None:
    source = made(result, *logs)
    page = Page(source)
    assert page.sections == [
        "results", "slices", "protocols", "knowledge", "training", "conflict", "guarantees", "examples", "about",
    ]  # fmt: skip
    text = " ".join(page.words)
    for shown in ("0.1234", "0.2500", "+0.26%", "57.750", "2.5e-07", "uniform99"):
        assert shown in text
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:|//)""", source)
    assert "<script" not in source
    for data in page.images.values():
        kind, _, body = data.partition(",")
        assert kind == "data:image/svg+xml;base64"
        ElementTree.fromstring(base64.b64decode(body))


def test_the_verdict_says_above_and_below(result: Evaluation) -> None:
    text = " ".join(Page(made(result)).words)
    assert "Search: below the best reference, lookup (difference -0.0500" in text
    result.metrics["paired"]["lookup"]["search"] |= {"difference_high": 0.01}
    assert "Search: not distinguishable from the best reference, lookup" in " ".join(Page(made(result)).words)


def test_user_text_stays_text(result: Evaluation) -> None:
    source = made(result)
    assert "<b>Bold" not in source
    assert "&lt;script&gt;alert(&#x27;q&#x27;)&lt;/script&gt;" in source
    assert "<b>Bold</b> & co" in " ".join(Page(source).words)


def test_what_tuning_did_not_write_is_left_out(result: Evaluation, tmp_path: Path) -> None:
    page = Page(made(result))
    assert not {"training", "conflict", "guarantees"} & set(page.sections)
    pl.DataFrame(schema={"step": pl.Int64, "name": pl.String, "value": pl.Float64}).write_parquet(
        tmp_path / "c.parquet"
    )
    pl.DataFrame({"step": [1], "module": ["a.b"]}).write_parquet(tmp_path / "d.parquet")
    page = Page(made(result, tmp_path / "c.parquet", tmp_path / "d.parquet"))
    assert not {"training", "conflict", "guarantees"} & set(page.sections)


def test_a_report_of_one_task_without_drift_slices_or_references(result: Evaluation) -> None:
    bare = {"model": {"search": result.metrics["model"]["search"], "joint": 0.25}, "references": {}}
    page = Page(made(Evaluation(bare, pl.DataFrame(), rankings())))
    assert page.sections == ["results", "examples", "about"]


def test_equal_results_give_equal_pages(result: Evaluation, logs: tuple[Path, Path]) -> None:
    assert made(result, *logs) == made(result, *logs)


def test_modules_of_every_family_find_their_layer(tmp_path: Path, result: Evaluation) -> None:
    modules = [
        "encoder.block.1.layer.0.SelfAttention.q", "decoder.block.1.layer.0.SelfAttention.q", "h.11.attn.c_attn", "lm",
    ]  # fmt: skip
    from gemst.evaluation.plots import _placed

    placed = _placed(pl.DataFrame({"module": modules}))
    assert placed["layer"].to_list() == ["encoder 1", "decoder 1", "11", "lm"]
    assert placed["kind"].to_list() == ["q", "q", "c_attn", "lm"]
    pl.DataFrame({"step": 1, "module": modules, "cosine": [0.1, -0.1, None, float("nan")]}).write_parquet(
        tmp_path / "d.parquet"
    )
    assert "conflict" in Page(made(result, diagnostics=tmp_path / "d.parquet")).sections


def test_worked_examples_are_titles_and_know_their_hits() -> None:
    shown = worked(examples(), rankings(), ITEMS, "search", count=4)
    assert len(shown) == 4
    assert [example.targets for example in shown] == [["Film 1"], ["Film 9"], ["Film 15"], ["Film 23"]]
    assert shown[0].history == ["Film 1", "gone", "<b>Bold</b> & co"]
    assert [example.places for example in shown] == [[2], [10], [], []]
    assert shown[1].answer[9] == ("Film 9", True)
    assert len(shown[0].answer) == 10
    assert not worked(examples().clear(), rankings(), ITEMS, "search")


def test_markdown_is_a_table_with_the_best_in_bold(result: Evaluation) -> None:
    text = report.markdown(result.metrics)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert "| **model** | **0.1234** | 0.1234 | 0.2500 |" in text
    assert "| lookup | 0.0500 | 0.0500 | **0.3000** |" in text
    assert "57.75 → 57.90 (+0.26%)" in text
    assert "30 items for 24 test examples" in text


def test_both_versions_are_written(result: Evaluation, logs: tuple[Path, Path], tmp_path: Path) -> None:
    facts = {"method": "gems & co"}
    report.write(tmp_path, result, items=ITEMS, test=examples(), tuning=logs[0].parent, facts=facts)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert {"training", "conflict"} <= set(page.sections)
    assert "gems & co" in " ".join(page.words)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == report.markdown(result.metrics)


def test_how_the_counts_were_weighed_is_told(result: Evaluation) -> None:
    fits = [Fit("search", 236, 0.25541, 0.26718, (0.65, 1.94, 0.12, 0.26, 0.01)), Fit("new query", 7, 0.1, 0.1, ALONE)]
    source = report.html(result, items=ITEMS, test=examples(), curves=NOTHING, diagnostics=NOTHING, memory=fits)
    page = Page(source)
    assert page.sections[:2] == ["results", "memory"]
    text = " ".join(page.words)
    for told in ("weight: clicked", "236", "0.2554", "0.2672", "1.94", "new query", "1.00"):
        assert told in text


def test_slices_stand_in_the_order_of_their_numbers() -> None:
    from gemst.evaluation.plots import _natural

    ordered = ["unseen", "seen 1-5", "seen 6-100", "seen 101+"]
    assert sorted(["seen 101+", "seen 6-100", "unseen", "seen 1-5"], key=_natural) == ordered
    assert sorted(["201+", "51-200", "0-10", "11-50"], key=_natural) == ["0-10", "11-50", "51-200", "201+"]
