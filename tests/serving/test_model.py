"""The registered model, loaded as a stranger would: by MLflow, without pickle."""

import mlflow
import polars as pl
import pytest
from mlflow.exceptions import MlflowException

from gemst import backbone, layout, registry
from gemst.config import Config
from gemst.ranking import rank
from tests.small_run import ITEMS


@pytest.fixture
def served(artifacts, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    registry.register(Config(), lambda folder: 0.0)
    return mlflow.pyfunc.load_model("models:/gemst@champion")


def test_ranks_like_the_library(served):
    answer = served.predict([{"history": ["a"], "query": "comedy", "k": 2}, {"history": []}])
    examples = pl.DataFrame({"query": ["comedy"], "history": [["a"]]})
    seen = pl.DataFrame({"row": [0], "item_id": ["a"]}, schema_overrides={"row": pl.UInt32})
    expected = rank(backbone.load_tuned(layout.MODEL), examples, 2, Config().ranking, seen)
    assert [item.item_id for item in answer[0].items] == expected["item_id"].to_list()
    assert [item.score for item in answer[0].items] == pytest.approx(expected["score"].to_list())
    titles = dict(ITEMS.select("item_id", "title").rows())
    assert all(item.title == titles[item.item_id] for response in answer for item in response.items)
    assert sorted(item.item_id for item in answer[1].items) == ["a", "b", "c", "d"]


def test_nothing_is_pickled(served):
    folder = registry.champion(Config()).folder.parents[1]
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pickle", ".bin", ".pt")]
    assert list(folder.rglob("model.safetensors"))


@pytest.mark.parametrize(
    "request_",
    [
        {"history": ["a"], "k": 0},
        {"history": ["a"], "k": 1001},
        {"history": ["a"] * 1001},
        {"history": ["a"], "query": "q" * 501},
    ],
)
def test_bounds_are_named(served, request_):
    with pytest.raises(MlflowException, match=r"1001|1000|500|equal to 1"):
        served.predict([request_])


def test_unknown_items_of_a_history_are_skipped(served):
    (known,) = served.predict([{"history": ["a"], "k": 1}])
    (mixed,) = served.predict([{"history": ["never seen", "a"], "k": 1}])
    assert mixed == known
