import polars as pl
import pytest

from gemst.data import general_text
from gemst.errors import GemstError


def corpus(path, count, **columns):
    pl.DataFrame(
        {"title": [f"Article {n}" for n in range(count)], "text": [f"Text {n}" for n in range(count)], **columns}
    ).write_parquet(path)
    return path


def test_four_fifths_calibrate_and_an_article_never_changes_side(tmp_path):
    calibration, heldout = general_text.split(corpus(tmp_path / "a.parquet", 1000))
    assert 750 < len(calibration) < 850
    assert len(calibration) + len(heldout) == 1000
    assert not set(calibration) & set(heldout)
    grown_calibration, grown_heldout = general_text.split(corpus(tmp_path / "b.parquet", 1300))
    assert set(calibration) <= set(grown_calibration)
    assert set(heldout) <= set(grown_heldout)


def test_order_of_the_file_does_not_matter(tmp_path):
    path = corpus(tmp_path / "a.parquet", 50)
    before = general_text.split(path)
    pl.read_parquet(path).reverse().write_parquet(path)
    assert general_text.split(path) == before


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"title": ["a"]}, "'text'"),
        ({"title": ["a"], "text": [1]}, "'text'"),
        ({"title": ["a"], "text": ["x"]}, "too few"),
    ],
)
def test_unusable_corpus(tmp_path, table, message):
    pl.DataFrame(table).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(GemstError, match=message):
        general_text.split(tmp_path / "a.parquet")


def test_damaged_corpus(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(GemstError, match="not readable"):
        general_text.split(tmp_path / "a.parquet")


def test_stretches_come_from_inside_long_texts_and_short_ones_stand_in() -> None:
    assert general_text.stretches(["a" * 2000 + "b" * 1300, "short"]) == ["b" * 1200]
    assert general_text.stretches(["short"]) == ["short"]
