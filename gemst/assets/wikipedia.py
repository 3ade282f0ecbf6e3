"""A slice of the English Wikipedia: from a bz2 XML dump to plain text, one row per article."""

from __future__ import annotations

import bz2
import re
from collections.abc import Iterator
from pathlib import Path

DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"

SHORTEST = 500  # characters of plain text below which a page is a stub

_NOT_PROSE = {"ref", "gallery", "math", "timeline", "table", "imagemap", "score", "syntaxhighlight", "source", "pre"}
_NOT_ARTICLES = re.compile(r"^\s*:?(file|image|category|media)\s*:", re.IGNORECASE)
_BACK_MATTER = re.compile(
    r"^(see also|references|external links|further reading|notes|bibliography|sources)$", re.IGNORECASE
)

_EMPTY = re.compile(r"\s*\([\s,;]*\)")  # what is left of a template in brackets


def make(source: Path, folder: Path) -> None:
    """Write articles.parquet (title, text) of the dump's articles, in its order; redirects and stubs are left out."""
    import polars as pl

    from gemst.progress import track

    pages = list(articles(source / DUMP))
    texts = [(title, plain(markup)) for title, markup in track(pages, "wikipedia")]
    kept = [(title, text) for title, text in texts if len(text) >= SHORTEST]
    pl.DataFrame(kept, schema={"title": pl.String, "text": pl.String}, orient="row").write_parquet(
        folder / "articles.parquet"
    )


def articles(dump: Path) -> Iterator[tuple[str, str]]:
    """(title, wiki markup) of every page of the article namespace that is no redirect."""
    from xml.etree import ElementTree

    with bz2.open(dump) as file:
        for _, page in ElementTree.iterparse(file):
            if not page.tag.endswith("}page"):
                continue
            space = page.tag.removesuffix("page")
            if page.findtext(f"{space}ns") == "0" and page.find(f"{space}redirect") is None:
                yield page.findtext(f"{space}title") or "", page.findtext(f"{space}revision/{space}text") or ""
            page.clear()


def plain(markup: str) -> str:
    """The prose of wiki markup: no templates, tables, references, images or back matter; one paragraph a line.

    >>> plain("'''Ada''' was a [[mathematician|scholar]].<ref>x</ref>{{stub}}\\n\\n== References ==\\nmore")
    'Ada was a scholar.'
    """
    import mwparserfromhell

    code = mwparserfromhell.parse(markup)
    for section in code.get_sections(levels=[2], include_headings=True):
        heading = section.filter_headings()[0]
        if _BACK_MATTER.match(str(heading.title).strip()):
            code.remove(section)
    for link in code.filter_wikilinks(matches=lambda link: bool(_NOT_ARTICLES.match(str(link.title)))):
        _discard(code, link)
    for tag in code.filter_tags(matches=lambda tag: str(tag.tag).strip().lower() in _NOT_PROSE):
        _discard(code, tag)
    for heading in code.filter_headings():
        _discard(code, heading)
    text = _EMPTY.sub("", str(code.strip_code(normalize=True, collapse=True)))
    lines = (re.sub(r"\s+", " ", line).strip(" *#:;") for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _discard(code: object, node: object) -> None:
    """Remove a node that may have gone already with one around it."""
    try:
        code.remove(node)  # type: ignore[attr-defined]
    except ValueError:
        return
