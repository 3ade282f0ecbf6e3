"""The files of a model version on this machine: where they lie, or brought from the tracking server once."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gemst import layout
from gemst.errors import GemstError
from gemst.files import atomic_folder
from gemst.registry.store import address

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_MODEL = Path("artifacts", "model")  # in a version's files
_DOWNLOADS = layout.MLRUNS / "downloads"
_KEPT = 2  # versions of a model: the champion's, and the one that a reader may still be at


def model_folder(client: MlflowClient, name: str, version: ModelVersion) -> Path:
    """The folder of a version's model, as `gemst tune` wrote it. Raises GemstError when its files cannot be had."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    model = f"models:/{name}/{version.version}"
    try:
        location = client.get_model_version_download_uri(name, version.version)
        if urlsplit(location).scheme in ("", "file"):
            found = Path(download_artifacts(model))  # which copies nothing
        else:
            place = hashlib.sha256(f"{address()} {location}".encode()).hexdigest()[:12]
            found = _DOWNLOADS / name / f"{version.version}-{place}"
            if not found.exists():
                with atomic_folder(found) as temporary:
                    download_artifacts(model, dst_path=str(temporary))
                    if not (temporary / _MODEL).is_dir():  # a server that lost files says nothing
                        raise FileNotFoundError(f"no model lies at {location}")
                _forget_old(found.parent)
    except (MlflowException, OSError) as error:
        raise GemstError(
            f"the files of {name} version {version.version} cannot be had ({' '.join(str(error).split())[:200]})",
            "Bring them back, or take the alias `champion` from it in the MLflow UI (`make ui`)",
        ) from None
    return found / _MODEL


def _forget_old(folder: Path) -> None:
    """Leave the newest downloads alone in `folder`; those that are being made have a name with a dot."""
    done = [path for path in folder.iterdir() if not path.name.startswith(".")]
    for path in sorted(done, key=lambda path: path.stat().st_mtime, reverse=True)[_KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
