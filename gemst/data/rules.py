"""What makes a row bad, and what is compared between versions of the data: plain polars, said once.

`expectations.py` states the same rules to Great Expectations; a test holds the two to the same counts.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any

import polars as pl

from gemst.data.tables import RECOMMENDATION, SEARCH, TASKS

EARLIEST = dt.datetime(1990, 1, 1, tzinfo=dt.UTC)  # no log of clicks is older than the web
CLOCK_SKEW = dt.timedelta(days=1)  # later than now by more than this is the future
LONGEST_ID, LONGEST_TITLE, LONGEST_QUERY, LONGEST_TEXT = 256, 2_000, 1_000, 100_000
# A character that can be seen: none of Unicode's white space. Spelt out, because engines differ on what \S is, and
# pandas looks for \S in Python, one row at a time.
REPEATED = "item_id is in an earlier row"
VISIBLE = "[^\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"


@dataclass(frozen=True)
class Rule:
    """`bad` is true for the rows to quarantine for `reason`; the first rule that holds names a row."""

    reason: str
    bad: pl.Expr


def item_rules() -> list[Rule]:
    """Rules over the items table."""
    rules = [
        Rule("item_id is missing", _blank("item_id")),
        Rule(f"item_id is longer than {LONGEST_ID} characters", _longer("item_id", LONGEST_ID)),
        Rule("title is missing", _blank("title")),
        Rule(f"title is longer than {LONGEST_TITLE} characters", _longer("title", LONGEST_TITLE)),
        Rule(f"text is longer than {LONGEST_TEXT} characters", _longer("text", LONGEST_TEXT)),
    ]
    # Among rows that are good so far: one without a title does not take the place of one that has it.
    good = ~pl.any_horizontal(rule.bad for rule in rules)
    return [*rules, Rule(REPEATED, ~pl.struct("item_id", good=good).is_first_distinct())]


def event_rules(now: dt.datetime) -> list[Rule]:
    """Rules over the events table; it needs the columns item_is_listed and item_is_good (see `mark_items`)."""
    return [
        Rule("user_id is missing", _blank("user_id")),
        Rule(f"user_id is longer than {LONGEST_ID} characters", _longer("user_id", LONGEST_ID)),
        Rule("item_id is missing", _blank("item_id")),
        Rule("item is not in items", ~pl.col("item_is_listed")),
        Rule("its item is in quarantine", ~pl.col("item_is_good")),
        Rule("timestamp is missing or not a time", pl.col("timestamp").is_null()),
        Rule(f"timestamp is before {EARLIEST:%Y}", pl.col("timestamp") < EARLIEST),
        Rule("timestamp is in the future", pl.col("timestamp") > now + CLOCK_SKEW),
        Rule(f"task is not one of {', '.join(TASKS)}", ~pl.col("task").is_in(TASKS).fill_null(False)),
        Rule("search without a query", (pl.col("task") == SEARCH) & _blank("query")),
        Rule("recommendation with a query", (pl.col("task") == RECOMMENDATION) & pl.col("query").is_not_null()),
        Rule(f"query is longer than {LONGEST_QUERY} characters", _longer("query", LONGEST_QUERY)),
    ]


def mark_items(events: pl.DataFrame, listed: pl.Series, good: pl.Series) -> pl.DataFrame:
    """Add item_is_listed (its item_id is in `listed`, or missing) and item_is_good (in `good`, or not listed).

    Each is false where that is what is wrong with a row: one is counted under one rule.
    """
    known = pl.DataFrame({"item_id": listed.drop_nulls().unique()})
    fine = pl.DataFrame({"item_id": good.drop_nulls().unique(), "item_is_good": True})
    known = known.join(fine, on="item_id", how="left").with_columns(item_is_listed=True)
    joined = events.join(known, on="item_id", how="left", maintain_order="left")
    listed_, good_ = pl.col("item_is_listed").fill_null(False), pl.col("item_is_good").fill_null(False)
    return joined.with_columns(item_is_listed=listed_ | _blank("item_id"), item_is_good=good_ | ~listed_)


def judge(table: pl.DataFrame, rules: list[Rule]) -> pl.Series:
    """The reason of each row, null for good rows."""
    reason = pl.coalesce(pl.when(rule.bad).then(pl.lit(rule.reason)) for rule in rules)
    return table.select(reason=reason)["reason"]


def judge_tables(items: pl.DataFrame, events: pl.DataFrame, now: dt.datetime) -> tuple[pl.Series, pl.Series]:
    """The reasons of both tables' rows; an event of a bad item is bad too."""
    why = judge(items, item_rules())
    marked = mark_items(events, items["item_id"], items.filter(why.is_null())["item_id"])
    return why, judge(marked, event_rules(now))


def count(table: str, reasons: pl.Series) -> dict[str, int]:
    """Rows by "table: reason"."""
    counted = reasons.drop_nulls().value_counts().sort("reason")
    return {f"{table}: {reason}": rows for reason, rows in counted.iter_rows()}


def profile(items: pl.DataFrame, events: pl.DataFrame) -> dict[str, Any]:
    """Sizes and distributions that are compared between two versions of the data."""
    if events.is_empty():
        return {"items": len(items), "events": 0}
    row = events.select(
        users=pl.col("user_id").n_unique(),
        search_share=(pl.col("task") == SEARCH).mean().round(6),
        newest=pl.col("timestamp").max().dt.to_string("iso:strict"),
        oldest=pl.col("timestamp").min().dt.to_string("iso:strict"),
        query_words=pl.col("query").str.split(" ").list.len().mean().round(6),
        top_item_share=(pl.col("item_id").unique_counts().max() / pl.len()).round(6),
    ).to_dicts()[0]
    return {"items": len(items), "events": len(events), **row}


def bounds(previous: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Least and largest acceptable value of each profile entry, given the last accepted version's.

    Volume may fall by half or grow tenfold; the share of searches and of the top item may move by 0.2, and neither task
    may lose three quarters of its share; queries may double or halve in length; the newest event may not get older.
    """
    limits: dict[str, tuple[Any, Any]] = {}
    limits |= {name: (previous[name] * 0.5, previous[name] * 10) for name in ("items", "events", "users")}
    limits |= {name: (previous[name] - 0.2, previous[name] + 0.2) for name in ("search_share", "top_item_share")}
    share, (least, most) = previous["search_share"], limits["search_share"]
    limits["search_share"] = (max(least, share / 4), min(most, 1 - (1 - share) / 4))
    if previous["query_words"]:
        limits["query_words"] = (previous["query_words"] * 0.5, previous["query_words"] * 2)
    limits["newest"] = (dt.datetime.fromisoformat(previous["newest"]), None)
    return limits


def _blank(column: str) -> pl.Expr:
    return pl.col(column).is_null() | ~pl.col(column).str.contains(VISIBLE)


def _longer(column: str, limit: int) -> pl.Expr:
    return (pl.col(column).str.len_chars() > limit).fill_null(False)
