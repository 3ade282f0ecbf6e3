"""Validation during tuning: full-catalogue NDCG@10 of both tasks on a fixed sample of users."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from gemst.backbone import Tuned
from gemst.errors import GemstError
from gemst.prompts import TASKS
from gemst.tuning.model import ItemModel
from gemst.tuning.parallel import Processes
from gemst.tuning.precision import autocast

if TYPE_CHECKING:
    from gemst.config import Config


class Validation:
    """Ranks the validation examples of evenly spaced users, of those that the tuned tasks have.

    The score is the harmonic mean of the tasks' NDCG@10. Each process of a run ranks its share of the examples, and all
    get the same scores. Raises GemstError when there is no example of the tuned tasks.
    """

    def __init__(
        self,
        config: Config,
        items: ItemModel,
        tuned: Tuned,
        train: pl.DataFrame,
        valid: pl.DataFrame,
        processes: Processes,
    ) -> None:
        from gemst.evaluation.protocols import seen_items

        self.config, self.items, self.tuned, self.processes = config, items, tuned, processes
        tasks = config.tuning.tasks
        users = (valid if tasks == "both" else valid.filter(task=tasks))["user_id"].unique().sort()
        if users.is_empty():
            raise GemstError(
                f"there is no validation example{'' if tasks == 'both' else f' for tuning.tasks: {tasks}'}: nothing "
                "says which weights are best",
                "Users with fewer than three requests of a task validate nothing: set data.split: global-time",
            )
        chosen = users.gather_every(max(1, len(users) // config.tuning.validate_users))
        everything = valid.filter(pl.col("user_id").is_in(chosen.implode()))
        self.examples = everything[processes.rank :: processes.count]
        self.seen = seen_items(self.examples, [train]) if config.evaluation.exclude_seen else None

    def __call__(self) -> dict[str, float]:
        """valid/ndcg10_recommendation, valid/ndcg10_search and valid/joint: their harmonic mean over tuned tasks."""
        from gemst.evaluation.metrics import harmonic_mean

        gathered = pl.concat(self.processes.gathered(self._scores()))
        by_task = {
            task: float(scores["ndcg@10"].mean() or 0.0)  # type: ignore[arg-type]
            for task in TASKS
            if len(scores := gathered.filter(task=task))
        }
        wanted = [value for task, value in by_task.items() if self.config.tuning.tasks in ("both", task)]
        told = {f"valid/ndcg10_{task}": value for task, value in by_task.items()}
        return told | {"valid/joint": harmonic_mean(wanted)}

    def _scores(self) -> pl.DataFrame:
        """task and ndcg@10 of this process's examples."""
        from gemst.evaluation.metrics import table_of_metrics
        from gemst.ranking import rank

        self.items.eval()
        with self.processes.unsharded(self.items):
            self.items.fold()  # outside autocast: the rows are those that will be exported
            with autocast(self.config.tuning.precision, self.processes.device):
                ranked = rank(self.tuned, self.examples, 10, self.config.ranking, self.seen)
        relevant = (
            self.examples.with_row_index("row").select("row", item_id="targets").explode("item_id", empty_as_null=True)
        )
        table = table_of_metrics(ranked, relevant, (10,)).sort("row")
        return pl.DataFrame({"task": self.examples["task"], "ndcg@10": table["ndcg@10"]})
