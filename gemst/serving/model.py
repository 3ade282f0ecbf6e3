"""The servable model, logged to MLflow as code: no object is pickled, the weights are safetensors.

MLflow copies this file beside the artefacts and runs it to get the model back.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import polars as pl
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

from gemst import backbone
from gemst.config import Ranking
from gemst.ranking import rank
from gemst.serving.api import DEFAULT_ITEMS, MOST_REQUESTS, Request, Response, Result


class Recommender(PythonModel):
    """Ranks the catalogue for a user's history and, where there is one, a query."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the checkpoint, the identifiers and the titles from the model's artefacts."""
        self.tuned = backbone.load_tuned(Path(context.artifacts["model"]), backbone.best_device())
        items = pl.read_parquet(context.artifacts["items"], columns=["item_id", "title"])
        self.titles: dict[str, str] = dict(items.iter_rows())
        settings: dict[str, Any] = context.model_config
        self.ranking = Ranking(**settings["ranking"])
        self.exclude_seen: bool = settings["exclude_seen"]

    def predict(self, model_input: list[Request]) -> list[Response]:  # type: ignore[override]
        """The `k` best items of every request, best first; items of the history are left out if the run did so too.

        Raises MlflowException, which a server answers with 400, for more than MOST_REQUESTS requests.
        """
        if len(model_input) > MOST_REQUESTS:
            raise MlflowException.invalid_parameter_value(
                f"{len(model_input):,} requests in one call: send {MOST_REQUESTS:,} or fewer"
            )
        examples = pl.DataFrame(
            {
                "task": ["recommendation" if request.query is None else "search" for request in model_input],
                "query": [request.query for request in model_input],
                "history": [request.history for request in model_input],
            },
            schema={"task": pl.String, "query": pl.String, "history": pl.List(pl.String)},
        )
        results: list[list[Result]] = [[] for _ in model_input]
        for at, k in self._batches([request.k or DEFAULT_ITEMS for request in model_input]):
            asked = examples[at]
            owned = (
                asked.with_row_index("row").select("row", item_id="history").explode("item_id").drop_nulls().unique()
            )
            ranked = rank(self.tuned, asked, k, self.ranking, owned if self.exclude_seen else None)
            for row, item_id, score in ranked.select("row", "item_id", "score").rows():
                title = self.titles.get(item_id, item_id)
                results[at[row]].append(Result(item_id=item_id, title=title, score=score))
        return [
            Response(items=items[: request.k or DEFAULT_ITEMS])
            for items, request in zip(results, model_input, strict=True)
        ]

    def _batches(self, wanted: list[int]) -> Iterator[tuple[list[int], int]]:
        """Requests to rank together, and their largest `k`: no request's `k` changes the beams of another."""
        beams = [0 if len(self.tuned.ids.level_sizes) == 1 else max(k, self.ranking.beams) for k in wanted]
        for width in sorted(set(beams)):
            at = [row for row, own in enumerate(beams) if own == width]
            yield at, max(wanted[row] for row in at)


mlflow.models.set_model(Recommender())
