"""A real flow run over real logs, DVC and Great Expectations, and its artefact read back from the API."""

import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from flows import commands, data_docs, pipeline, tasks
from gemst import layout
from gemst.files import write_json

DVC_YAML = """
stages:
  ingest:
    cmd: {gemst} ingest
    deps: [logs]
    outs: [artifacts/tables: {{persist: true}}]
  validate:
    cmd: {gemst} validate
    deps: [artifacts/tables]
    outs: [artifacts/validated, artifacts/quarantine, artifacts/validation: {{persist: true}}]
"""


@pytest.fixture
def logs(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Own logs in a DVC project of two real stages, `ingest` and `validate`; an evaluation is there already."""
    folder = project / "logs"
    folder.mkdir()
    (folder / "items.csv").write_text("item_id,title\na,Soap\nb,Brush\n")
    write_events(folder, 100)
    (project / "params.yaml").write_text("seed: 1\ndata: {source: table, path: logs}\n")
    (project / "dvc.yaml").write_text(DVC_YAML.format(gemst=f"{Path(sys.executable).as_posix()} -m gemst.cli"))
    write_json(layout.EVALUATION / "metrics.json", {"model": {"joint": 0.1}, "references": {}})
    real = commands.run
    monkeypatch.setattr(
        tasks,
        "run",
        lambda module, *rest, say: real(module, *rest, say=say) if module == "dvc" else commands.Outcome(0, ()),
    )
    return folder


def write_events(folder: Path, good: int) -> None:
    rows = [f"u{n},a,2024-01-01T00:{n % 60:02}:{n // 60:02},\n" for n in range(good)]
    rows += ["u,nowhere,2024-01-01,\n", "u,a,2999-01-01,red\n", "u0,a,2024-01-01T00:00:00,\n"]
    (folder / "events.csv").write_text("user_id,item_id,timestamp,query\n" + "".join(rows))


def artefact() -> str:
    from prefect.artifacts import Artifact

    found = Artifact.get(data_docs.KEY)
    assert found is not None
    return str(found.data)


def linked_pages(text: str) -> dict[str, str]:
    """What the artefact's links lead to, by the text of the link."""
    links = re.findall(r"^- \[([^]]+)\]\((file://[^)]+)\)", text, re.M)
    return {name: Path(unquote(urlparse(uri).path)).read_text(encoding="utf-8") for name, uri in links}


def status(page: str) -> str:
    return re.search(r"Status:.*?(Succeeded|Failed)", page, re.S)[1]


@pytest.mark.usefixtures("prefect_api")
def test_the_artefact_leads_to_the_data_docs_of_an_accepted_and_of_a_refused_version(logs):
    assert pipeline.pipeline(return_state=True).is_completed()
    text = artefact()
    assert re.search(r"^# \d\d expectations hold$", text, re.M)
    for said in (
        "- items: 2 rows in = 2 out + 0 in quarantine + 0 dropped",
        "- events: 103 rows in = 100 out + 2 in quarantine + 1 dropped",
        "- 1 events: item is not in items",
        "- 1 events: timestamp is in the future",
        "- 1 events: exact duplicate of another row",
    ):
        assert said in text.splitlines()
    pages = linked_pages(text)
    assert set(pages) == {"all pages", "tables-events-0", "tables-items-0", "tables-versions-0"}
    assert "tables-events-0.html" in pages["all pages"]
    assert status(pages["tables-versions-0"]) == "Succeeded"
    assert "item_is_listed" in pages["tables-events-0"]

    write_events(logs, 30)
    state = pipeline.pipeline(return_state=True)
    assert state.is_failed()
    assert "versions: events is near the last version's (100)" in state.message
    text = artefact()
    assert "- versions: events is near the last version's (100), but is 30" in text.splitlines()
    assert "- events: 33 rows in = 30 out + 2 in quarantine + 1 dropped" in text.splitlines()
    assert status(linked_pages(text)["tables-versions-0"]) == "Failed"


def test_a_validation_that_judged_nothing_leaves_no_artefact(tmp_path, monkeypatch):
    """An old report is not shown as the new version's."""
    monkeypatch.chdir(tmp_path)
    published = []
    monkeypatch.setattr(data_docs, "create_markdown_artifact", lambda text, **names: published.append(text))
    data_docs.publish(held=False)
    write_json(layout.TABLES / "ingest.json", {"rows_in": {"events": 3}, "dropped": {}})
    report = {"rows_in": {"events": 3}, "rows_out": {"events": 2}}
    report |= {"quarantined": {"events: too early": 1}, "expectations": 30, "failed": []}
    write_json(layout.VALIDATION / "report.json", report)
    data_docs.publish(held=False)
    assert published == []
    data_docs.publish(held=True)
    assert "- events: 3 rows in = 2 out + 1 in quarantine + 0 dropped" in published[0]
