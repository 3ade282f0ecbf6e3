"""What a benchmark reads off its runs, where that is more than a stopwatch."""

from __future__ import annotations

import polars as pl
import pytest

from benchmarks.forgetting import curve, kl_at


def test_a_curve_of_forgetting_starts_at_the_score_before_the_first_step() -> None:
    rows = [(0, "valid/joint", 0.10), (5, "drift/kl", 0.5), (10, "valid/joint", 0.12), (10, "drift/kl", 2.0)]
    curves = pl.DataFrame([*rows, (10, "lr", 1.0)], schema=["step", "name", "value"], orient="row")
    points = curve(curves)
    assert points == [{"step": 0, "ndcg10": 0.1, "kl": 0.0}, {"step": 10, "ndcg10": 0.12, "kl": 2.0}]
    assert kl_at(0.11, points) == pytest.approx(1.0)  # half way up from 0.10, not eleven twelfths up from nothing
    assert kl_at(0.09, points) == 0.0
    assert kl_at(0.13, points) is None
