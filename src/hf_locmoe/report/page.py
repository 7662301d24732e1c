# SPDX-License-Identifier: Apache-2.0
"""`routing.html`: one file with everything in it, for light and dark screens, without a network."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #fdfdfc; --line: #d9dde2; --panel: #f4f5f6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e2e6ea; --soft: #9aa4af; --paper: #14171b; --line: #343a42; --panel: #1d2126; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 54rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; margin: 3rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2.2rem 0 .5rem; }
p { margin: .5rem 0; }
.lead, .counterpart { color: var(--soft); }
.counterpart { font-size: .9rem; }
figure { margin: .8rem 0 1rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px;
  padding: .5rem; }
.table { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.missing { background: var(--panel); border-left: 3px solid var(--line); padding: .6rem .9rem; font-size: .93rem; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { margin-top: 3rem; color: var(--soft); font-size: .88rem; }
@media print { body { max-width: none; padding: 0; } h2, h3 { break-after: avoid; } figure { break-inside: avoid; } }
"""


@dataclass
class Table:
    """Headings and rows of text; numbers are formatted by the caller."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Section:
    """
    One heading of the page.

    Args:
        title (`str`): Heading.
        text (`list[str]`): Paragraphs; `code` between backticks.
        counterpart (`str`): What the paper shows in its place.
        image (`Path`, *optional*): A PNG file.
        table (`Table`, *optional*): Under the figure.
        missing (`str`): Why there is no figure.
        level (`int`): 2 or 3.
    """

    title: str
    text: list[str] = field(default_factory=list)
    counterpart: str = ""
    image: Path | None = None
    table: Table | None = None
    missing: str = ""
    level: int = 3


def render_page(title: str, lead: str, sections: Sequence[Section], footer: str) -> str:
    """
    The page as one string of HTML, images inlined.

    Args:
        title (`str`): Of the page.
        lead (`str`): One sentence under it.
        sections (`Sequence[Section]`): In order.
        footer (`str`): How the page was made.
    """
    body = "\n".join(_section(section) for section in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="lead">{escape(lead)}</p>\n{body}\n<footer>{_text(footer)}</footer>\n</body>\n</html>\n'
    )


def _section(section: Section) -> str:
    parts = [f"<h{section.level}>{escape(section.title)}</h{section.level}>"]
    parts += [f"<p>{_text(paragraph)}</p>" for paragraph in section.text]
    if section.missing:
        parts.append(f'<p class="missing">{_text(section.missing)}</p>')
    if section.image is not None:
        data = base64.b64encode(section.image.read_bytes()).decode("ascii")
        parts.append(f'<figure><img src="data:image/png;base64,{data}" alt="{escape(section.title)}"></figure>')
    if section.counterpart:
        parts.append(f'<p class="counterpart">In the paper: {escape(section.counterpart)}</p>')
    if section.table is not None:
        parts.append(_table(section.table))
    return "\n".join(parts)


def _text(text: str) -> str:
    """Escaped, with `code` between backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


__all__ = ["Section", "Table", "render_page"]
