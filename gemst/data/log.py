"""An event log as sorted arrays of codes: what the split and the histories are computed on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gemst.data.tables import SEARCH, codes, tie_break

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Log:
    """Events in canonical order; every array is (events,).

    `row` points into the table the log was made from. `unit` is the position of the first event of the same request
    (its own position for an event without one): the clicks of one result page are one unit, at the time of the first
    of them. `paged` is False for an event without a request where its user and task have requests: such as recent
    clicks that a page lists, whose task and time are guesses.
    """

    user: NDArray[np.uint32]
    item: NDArray[np.uint32]
    time: NDArray[np.int64]
    search: NDArray[np.bool_]
    unit: Rows
    paged: NDArray[np.bool_]
    row: Rows
    users: pl.Series  # user_id of each code, sorted
    items: pl.Series  # item_id of each code, sorted

    def __len__(self) -> int:
        return len(self.user)

    def only(self, kept: NDArray[np.bool_]) -> Log:
        """The log of the kept events; codes stay."""
        if kept.all():
            return self
        # A unit that loses its first event is led by its next one.
        unit = self.unit[kept]
        _, first, inverse = np.unique(unit, return_index=True, return_inverse=True)
        return Log(
            self.user[kept], self.item[kept], self.time[kept], self.search[kept], first[inverse], self.paged[kept],
            self.row[kept], self.users, self.items,
        )  # fmt: skip

    @property
    def unit_time(self) -> NDArray[np.int64]:
        """Epoch ms of each event's unit."""
        return self.time[self.unit]


def code(items: pl.DataFrame, events: pl.DataFrame) -> tuple[Log, int]:
    """Sort and code `events`; returns the log and how many events were left out as their item is not in `items`."""
    user, users = codes(events["user_id"])
    catalogue = items["item_id"].unique().sort()
    coded = pl.DataFrame(
        {
            "user": user,
            "item": events["item_id"].cast(pl.Enum(catalogue), strict=False).to_physical().cast(pl.UInt32),
            "time": events["timestamp"].dt.epoch("ms"),
            "search": events["task"] == SEARCH,
            "tie": tie_break(events),
        }
    ).with_row_index("row")
    unknown = coded["item"].null_count()
    if unknown:
        coded = coded.filter(pl.col("item").is_not_null())
    coded = coded.sort("user", "time", "search", "tie")
    row = coded["row"].to_numpy().astype(np.int64)
    unit = np.arange(len(coded))
    paged = np.ones(len(coded), bool)
    if events["request_id"].null_count() < len(events):
        keyed = coded.select(
            "user", "search", position=pl.int_range(pl.len()), request=events["request_id"].gather(row)
        )
        first = pl.col("position").min().over("user", "search", "request")
        alone = pl.col("request").is_null()
        unit = keyed.select(pl.when(alone).then("position").otherwise(first))["position"].to_numpy()
        paged = keyed.select((~alone | alone.all().over("user", "search")).alias("paged"))["paged"].to_numpy()
    sorted_user, item, time, search = (coded[name].to_numpy() for name in ("user", "item", "time", "search"))
    return Log(sorted_user, item, time, search, unit, paged, row, users, catalogue), unknown
