"""From a dump to prose."""

import bz2
import doctest

import polars as pl
import pytest

from gemst.assets import wikipedia

PAGE = "<page><title>{title}</title><ns>{ns}</ns>{redirect}<revision><text>{text}</text></revision></page>"
LONG = "A sentence about the world. " * 40


def page(title: str, text: str, ns: int = 0, redirect: str = "") -> str:
    return PAGE.format(title=title, text=text, ns=ns, redirect=redirect)


@pytest.fixture
def dump(tmp_path):
    pages = [
        page("Zebra", LONG + "[[Horse]]s too."),
        page("Moved", LONG, redirect='<redirect title="Zebra" />'),
        page("Talk:Zebra", LONG, ns=1),
        page("Stub", "Short."),
        page("Apple", LONG),
    ]
    xml = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(pages)}</mediawiki>'
    (tmp_path / wikipedia.DUMP).write_bytes(bz2.compress(xml.encode()))
    return tmp_path


def test_articles_alone_in_the_dumps_order(dump, tmp_path):
    wikipedia.make(dump, tmp_path)
    table = pl.read_parquet(tmp_path / "articles.parquet")
    assert table.schema == {"title": pl.String, "text": pl.String}
    assert table["title"].to_list() == ["Zebra", "Apple"]
    assert table["text"][0].endswith("Horses too.")


def test_equal_bytes_every_time(dump, tmp_path):
    wikipedia.make(dump, tmp_path)
    before = (tmp_path / "articles.parquet").read_bytes()
    wikipedia.make(dump, tmp_path)
    assert (tmp_path / "articles.parquet").read_bytes() == before


@pytest.mark.parametrize(
    ("markup", "prose"),
    [
        ("'''Bold''' and ''it''", "Bold and it"),
        ("[[a|b]] [[c]] [http://x.org d]", "b c d"),
        ("x<ref name=a>y</ref>z{{cite|t={{u}}}}", "xz"),
        ("{| class=wikitable\n| a\n|}\nafter", "after"),
        ("[[File:x.jpg|thumb|a [[nested]] caption]]text", "text"),
        ("[[Category:Animals]]text", "text"),
        ("text (from {{lang|el|x}}) and ({{x}})", "text (from ) and"),
        ("one\n\n== A heading ==\ntwo", "one\ntwo"),
        ("one\n\n==See also==\n* [[two]]", "one"),
        ("* item\n# numbered", "item\nnumbered"),
        ("<math>x^2</math>is", "is"),
        ("a &amp; b", "a & b"),
    ],
)
def test_markup_is_stripped(markup, prose):
    assert wikipedia.plain(markup) == prose


def test_documented_example():
    assert doctest.testmod(wikipedia).failed == 0
