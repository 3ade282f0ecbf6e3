"""What a client sends and what it gets back; every size is bounded."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

MOST_ITEMS = 1000  # largest k
DEFAULT_ITEMS = 10
LONGEST_HISTORY = 1000  # item ids in a request; the model reads the last `data.max_history` of them
LONGEST_QUERY = 500  # characters
LONGEST_ID = 256  # characters, as `gemst validate` has it
MOST_REQUESTS = 1000  # in one call


class Request(BaseModel):
    """One user's history, with a query for search and without one for recommendation."""

    model_config = ConfigDict(extra="forbid")

    history: list[str] = Field(
        max_length=LONGEST_HISTORY,
        description="item ids, oldest first; those of the request's own task where the model was tuned with "
        "data.history: own; unknown ones are skipped",
    )
    query: str | None = Field(
        default=None, min_length=1, max_length=LONGEST_QUERY, description="given for search alone"
    )
    k: int | None = Field(
        default=None, ge=1, le=MOST_ITEMS, description=f"how many items to return, {DEFAULT_ITEMS} if not said"
    )

    # MLflow's signatures know plain types alone, so what an id and a query may be is checked here.
    @field_validator("history")
    @classmethod
    def _ids(cls, ids: list[str]) -> list[str]:
        for item_id in ids:
            if len(item_id) > LONGEST_ID:
                raise ValueError(f"an item id has {LONGEST_ID} characters or fewer, not {len(item_id):,}")
            item_id.encode()  # a lone surrogate is no text: UnicodeEncodeError is a ValueError
        return ids

    @field_validator("query", mode="before")
    @classmethod
    def _stripped(cls, query: Any) -> Any:
        return query.strip() if isinstance(query, str) else query


class Result(BaseModel):
    """One ranked item; the score is the log probability of its identifier, or what the model's memory makes of it."""

    item_id: str
    title: str
    score: float


class Response(BaseModel):
    """The k best items of a request, best first."""

    items: list[Result]
