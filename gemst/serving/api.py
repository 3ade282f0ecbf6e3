"""What a client sends and what it gets back; every size is bounded."""

from pydantic import BaseModel, ConfigDict, Field

MOST_ITEMS = 1000  # largest k
DEFAULT_ITEMS = 10
LONGEST_HISTORY = 1000  # item ids in a request; the model reads the last `data.max_history` of them
LONGEST_QUERY = 500  # characters


class Request(BaseModel):
    """One user's history, with a query for search and without one for recommendation."""

    model_config = ConfigDict(extra="forbid")

    history: list[str] = Field(
        max_length=LONGEST_HISTORY, description="item ids, oldest first; unknown ones are skipped"
    )
    query: str | None = Field(
        default=None, min_length=1, max_length=LONGEST_QUERY, description="given for search alone"
    )
    k: int | None = Field(
        default=None, ge=1, le=MOST_ITEMS, description=f"how many items to return, {DEFAULT_ITEMS} if not said"
    )


class Result(BaseModel):
    """One ranked item; the score is the log probability of its identifier."""

    item_id: str
    title: str
    score: float


class Response(BaseModel):
    """The k best items of a request, best first."""

    items: list[Result]
