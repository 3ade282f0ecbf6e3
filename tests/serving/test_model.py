"""The registered model, loaded as a stranger would: by MLflow, without pickle."""

import mlflow
import polars as pl
import pytest
from fastapi.testclient import TestClient
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server

from gemst import backbone, layout, registry
from gemst.config import Config, Ranking
from gemst.ranking import rank
from gemst.serving.api import Request
from gemst.serving.model import Recommender
from tests.ranking.tiny import make_tuned, random_ids
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
        {"history": ["a"], "query": " \n"},
        {"history": ["a" * 257]},
        {"history": ["\ud800"]},
    ],
)
def test_bounds_are_named(served, request_):
    with pytest.raises(MlflowException, match=r"1001|1000|500|equal to 1|at least 1|256|surrogates not allowed"):
        served.predict([request_])


def test_too_many_requests_in_one_call_are_refused(served):
    with pytest.raises(MlflowException, match="1,001 requests in one call"):
        served.predict([{"history": []}] * 1001)


def test_over_http(served):
    """As `mlflow models serve` answers: a list of requests in, a list of rankings out; bad input is a 400."""
    client = TestClient(scoring_server.init(served))
    asked = [{"history": ["a"], "query": " comedy ", "k": 2}]
    answer = client.post("/invocations", json={"inputs": asked})
    assert answer.status_code == 200, answer.text
    (direct,) = served.predict(asked)
    assert [item["item_id"] for item in answer.json()["predictions"][0]["items"]] == [i.item_id for i in direct.items]
    assert client.post("/invocations", json={"inputs": [{"history": ["a"], "k": 0}]}).status_code == 400


def test_a_large_k_changes_no_answer_beside_it():
    ids = random_ids(60, (8, 4, 4))
    model = Recommender()
    model.tuned, model.titles, model.ranking, model.exclude_seen = make_tuned("llama", ids), {}, Ranking(beams=2), True
    small, large = Request(history=["i1"], k=3), Request(history=["i2"], k=60)
    predict = Recommender.predict.__wrapped__  # MLflow's check of the input aside
    together = [[item.item_id for item in answer.items] for answer in predict(model, [large, small, large])]
    (alone,) = predict(model, [small])
    assert together[1] == [item.item_id for item in alone.items]
    wide = rank(model.tuned, pl.DataFrame({"history": [["i1"]], "query": pl.Series([None], dtype=pl.String)}), 3,
                Ranking(beams=60), pl.DataFrame({"row": [0], "item_id": ["i1"]}))  # fmt: skip
    assert together[1] != wide["item_id"].to_list()  # else the beams would not matter here
    assert together[0] == together[2]
    assert len(set(together[0])) == 59
    assert alone.items[0].title == alone.items[0].item_id  # no title is known


def test_unknown_items_of_a_history_are_skipped(served):
    (known,) = served.predict([{"history": ["a"], "k": 1}])
    (mixed,) = served.predict([{"history": ["never seen", "a"], "k": 1}])
    assert mixed == known
