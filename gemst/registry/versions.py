"""Model versions: making one, which of them is the champion, and what it was judged by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemst import layout
from gemst.errors import GemstError
from gemst.files import require
from gemst.registry.downloads import model_folder
from gemst.registry.store import connect, explained, no_model

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from gemst.config import Config

CHAMPION, CHALLENGER, SUPERSEDED = "champion", "challenger", "superseded"

# Tags of a version: the hash of model and results, the joint score, the hash of the examples it was measured on, how it
# fared against the champion, and the version it grew from.
FINGERPRINT, JOINT, EXAMPLES = "gemst.fingerprint", "gemst.joint", "gemst.examples"
JUDGED, APPENDED = "gemst.judged", "gemst.appended_to"

Rescore = Callable[[Path], float]  # a model's folder to its joint score on the present test examples


@dataclass(frozen=True)
class Registered:
    """A model version (None: the results alone were logged), its run, its role now, its score, how it was judged or
    why it is no version."""

    version: int | None
    run_id: str
    role: str | None
    joint: float
    judged: str = ""


@dataclass(frozen=True)
class Champion:
    """The champion's version and the folder of its model, as `gemst tune` wrote it."""

    version: int
    folder: Path


def champion(config: Config) -> Champion:
    """The champion now. Raises GemstError when there is none."""
    with explained():
        name = model_name(config)
        client = connect(absent=no_model(name))
        version = alias(client, name, CHAMPION)
        if version is None:
            raise no_model(name)
        return Champion(int(version.version), model_folder(client, name, version))


def succeed(config: Config, model: Path, grown_from: Champion) -> Registered:
    """Make `model`, the champion with other items or counts (`gemst.tuning.append`), a version in its place.

    It is the same run's, with the same joint score: nothing was trained. The tag gemst.appended_to names the version
    it grew from. Raises GemstError when another version has become champion meanwhile or the database cannot be used.
    """
    with explained():
        name = model_name(config)
        client = connect(absent=no_model(name))
        before = alias(client, name, CHAMPION)
        if before is None or before.run_id is None:
            raise no_model(name)
        _same_champion(before, grown_from, name)
        kept = {tag: before.tags[tag] for tag in (JOINT, EXAMPLES) if tag in before.tags}
        grown = {APPENDED: str(before.version), JUDGED: f"version {before.version} with other items or counts"}
        version = new_version(client, config, name, before.run_id, kept | grown, model)
        try:  # logging a model takes a while
            _same_champion(alias(client, name, CHAMPION), grown_from, name)
        except GemstError:
            client.delete_model_version(name, version.version)
            raise
        client.set_registered_model_alias(name, CHAMPION, version.version)
        joint = float(before.tags.get(JOINT, "nan"))
        return Registered(int(version.version), before.run_id, CHAMPION, joint, grown[JUDGED])


def _same_champion(now: ModelVersion | None, then: Champion, name: str) -> None:
    if now is None or int(now.version) != then.version:
        found = "no champion" if now is None else f"a new champion, version {now.version},"
        raise GemstError(f"{name} has {found} since version {then.version} was read", "Run `gemst append` again")


def crown(client: MlflowClient, name: str, version: ModelVersion, rescore: Rescore) -> str:
    """Judge a version: champion if its joint score is higher than the champion's, else challenger; returns the words.

    Scores compare only on the same examples. A champion that was measured on others is measured again, by `rescore`.
    The version is tagged as judged at the very end: where this is interrupted, the next call judges it again.
    """
    given, words = CHAMPION, "the first one"
    own = judged = int(version.version)
    # Measuring a champion takes a while: one that was crowned meanwhile is the one to beat.
    while (holder := alias(client, name, CHAMPION)) is not None and int(holder.version) not in (own, judged):
        same = JOINT in holder.tags and holder.tags.get(EXAMPLES) == version.tags[EXAMPLES]
        theirs = float(holder.tags[JOINT]) if same else rescore(model_folder(client, name, holder))
        given = CHAMPION if float(version.tags[JOINT]) > theirs else CHALLENGER
        words = f"champion version {holder.version} had {theirs:.4f} on the same examples"
        judged = int(holder.version)
    client.set_registered_model_alias(name, given, version.version)
    client.set_model_version_tag(name, version.version, JUDGED, words)
    return words


def role(client: MlflowClient, name: str, version: ModelVersion) -> str:
    """What a version is now."""
    for one in (CHAMPION, CHALLENGER):
        holder = alias(client, name, one)
        if holder is not None and int(holder.version) == int(version.version):
            return one
    return SUPERSEDED


def new_version(
    client: MlflowClient, config: Config, name: str, run_id: str, tags: dict[str, str], model: Path = layout.MODEL
) -> ModelVersion:
    """Log the model as code plus safetensors, and register it."""
    import mlflow

    import gemst
    from gemst import serving
    from gemst.progress import Progress

    items = require(layout.VALIDATED / "items.parquet", made_by="gemst validate")
    with Progress("logging the model") as progress, mlflow.start_run(run_id=run_id), _quiet():
        progress.advance(by=0)
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(serving.__file__).with_name("model.py")),
            artifacts={"model": str(model), "items": str(items)},
            model_config={"ranking": config.ranking.model_dump(), "exclude_seen": config.evaluation.exclude_seen},
            pip_requirements=[f"gemst=={gemst.__version__}"],
        )
    with contextlib.suppress(mlflow.exceptions.MlflowException):  # it is there already
        client.create_registered_model(name, description="Search and recommendation with one generative model")
    return client.create_model_version(
        name, source=logged.model_uri, run_id=run_id, tags=tags, model_id=logged.model_id, await_creation_for=60
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's remarks about input examples and type hints out of the log."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def model_name(config: Config) -> str:
    """`registry.model_name`. Raises GemstError when it is null."""
    if config.registry.model_name is None:
        raise GemstError("registry.model_name is null: there is no model to look for", "Name one in params.yaml")
    return config.registry.model_name


def alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version that bears `alias`; None where none does, or there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
