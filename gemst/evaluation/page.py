"""The HTML a report is made of: escaped text, tables, figures, one style sheet."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

STYLE = """
:root { --ink:#1b2430; --muted:#667085; --line:#e6e9ef; --accent:#3452d9; --good:#12805c; --bad:#c2412d }
:root { color-scheme:light }
* { box-sizing: border-box }
body { margin:0; background:#f5f6f9; color:var(--ink) }
body { font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif }
main { max-width:1120px; margin:0 auto; padding:40px 24px 80px }
header h1 { font-size:28px; margin:0 0 4px; letter-spacing:-.02em }
header p, .note { color:var(--muted); margin:0 0 8px; max-width:80ch }
nav { display:flex; flex-wrap:wrap; gap:4px 18px; margin:14px 0 26px; font-size:14px }
a { color:var(--accent); text-decoration:none } a:hover { text-decoration:underline }
section { background:#fff; border:1px solid var(--line); border-radius:12px; padding:22px 26px; margin:0 0 22px }
h2 { font-size:19px; margin:0 0 6px; letter-spacing:-.01em } h3 { font-size:15px; margin:22px 0 6px }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(185px,1fr)); gap:14px; margin:0 0 22px }
.card { background:#fff; border:1px solid var(--line); border-radius:12px; padding:14px 18px }
.card b { display:block; font-size:26px; letter-spacing:-.02em; font-variant-numeric:tabular-nums }
.card span { color:var(--muted); font-size:13px } .card small { display:block; color:var(--muted); font-size:12.5px }
.scroll { overflow-x:auto } figure { margin:12px 0 0 } figure img { width:100%; height:auto; display:block }
.pair { display:grid; grid-template-columns:repeat(auto-fill,minmax(380px,1fr)); gap:18px }
table { border-collapse:collapse; width:100%; font-size:14px; font-variant-numeric:tabular-nums }
th { text-align:left; color:var(--muted); font-weight:600; font-size:12.5px }
th, td { padding:7px 10px; border-bottom:1px solid var(--line); white-space:nowrap } td.n, th.n { text-align:right }
tr.model td { background:#f3f5fe; font-weight:600 } td.best { color:var(--accent); font-weight:700 }
.good { color:var(--good) } .bad { color:var(--bad) }
details { border-top:1px solid var(--line); padding:9px 0 } summary { cursor:pointer }
summary .q { font-weight:600 } .hit { color:var(--good); font-weight:650 } .miss { color:var(--muted) }
.example { display:grid; grid-template-columns:1fr 1.4fr; gap:20px; margin:8px 0 6px 18px; font-size:14px }
.example ol, .example ul { margin:4px 0; padding-left:22px }
.example h4 { margin:4px 0; font-size:12.5px; color:var(--muted) }
li.hit::marker { color:var(--good) } footer { color:var(--muted); font-size:13px }
@media (max-width:640px) { .example { grid-template-columns:1fr } section { padding:16px } }
@media print { body { background:#fff } section { break-inside:avoid } }
"""

Cell = str | tuple[str, str]  # text, or (text, CSS class)


def document(title: str, body: Sequence[str]) -> str:
    """A complete page that asks nothing of any network."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(anchor: str, title: str, note: str, *parts: str) -> str:
    """A titled section; nothing at all when none of `parts` has content."""
    content = "\n".join(part for part in parts if part)
    if not content:
        return ""
    about = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n{about}\n{content}\n</section>'


def figure(svg: str, alt: str) -> str:
    """An SVG as an image of its own, so that the ids inside two figures cannot meet; empty for empty text."""
    if not svg:
        return ""
    data = base64.b64encode(svg.encode()).decode()
    return f'<figure><img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}"></figure>'


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], marked: str = "") -> str:
    """A table whose first column is text and whose others are numbers; the row that starts with `marked` stands out."""
    lines = []
    for row in rows:
        cells = [cell if isinstance(cell, tuple) else (cell, "") for cell in row]
        inner = "".join(
            f'<td class="{"n " if at else ""}{css}">{escape(text)}</td>' for at, (text, css) in enumerate(cells)
        )
        lines.append(f"<tr{' class=model' if cells[0][0] == marked else ''}>{inner}</tr>")
    titles = "".join(f"<th{' class=n' if at else ''}>{escape(title)}</th>" for at, title in enumerate(head))
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def pair(*parts: str) -> str:
    """Parts side by side where the window is wide enough; empty when all are."""
    return f'<div class="pair">{"".join(parts)}</div>' if any(parts) else ""


def card(label: str, value: str, detail: str = "") -> str:
    """One number that matters."""
    return f'<div class="card"><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(detail)}</small></div>'
