"""The servable model, logged to MLflow as code: no object is pickled, the weights are safetensors.

MLflow copies this file beside the artefacts and runs it to get the model back.
"""

from pathlib import Path
from typing import Any

import mlflow
import polars as pl
from mlflow.pyfunc import PythonModel, PythonModelContext

from gemst import backbone
from gemst.config import Ranking
from gemst.ranking import rank
from gemst.serving.api import DEFAULT_ITEMS, Request, Response, Result


class Recommender(PythonModel):
    """Ranks the catalogue for a user's history and, where there is one, a query."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the checkpoint, the identifiers and the titles from the model's artefacts."""
        self.tuned = backbone.load_tuned(Path(context.artifacts["model"]), backbone.best_device())
        self.titles = pl.read_parquet(context.artifacts["items"], columns=["item_id", "title"])
        settings: dict[str, Any] = context.model_config
        self.ranking = Ranking(**settings["ranking"])
        self.exclude_seen: bool = settings["exclude_seen"]

    def predict(self, model_input: list[Request]) -> list[Response]:  # type: ignore[override]
        """The `k` best items of every request, best first; items of the history are left out if the run did so too."""
        if not model_input:
            return []
        examples = pl.DataFrame(
            {
                "task": ["recommendation" if request.query is None else "search" for request in model_input],
                "query": [request.query for request in model_input],
                "history": [request.history for request in model_input],
            },
            schema={"task": pl.String, "query": pl.String, "history": pl.List(pl.String)},
        )
        owned = examples.with_row_index("row").select("row", item_id="history").explode("item_id").drop_nulls().unique()
        wanted = [request.k or DEFAULT_ITEMS for request in model_input]
        ranked = rank(self.tuned, examples, max(wanted), self.ranking, owned if self.exclude_seen else None)
        titled = ranked.join(self.titles, on="item_id", how="left").sort("row", "rank")
        results: list[list[Result]] = [[] for _ in model_input]
        for row, place, item_id, title, score in titled.select("row", "rank", "item_id", "title", "score").rows():
            if place <= wanted[row]:
                results[row].append(Result(item_id=item_id, title=title, score=score))
        return [Response(items=items) for items in results]


mlflow.models.set_model(Recommender())
