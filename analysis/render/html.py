"""Pages of HTML: no scripts, nothing fetched, dark where the reader's system is, and tables that scroll on a phone."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from html import unescape
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from analysis.escape import escape_html

if TYPE_CHECKING:
    from analysis.tables import Cell, Column, Table

_STYLE = """\
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --faint: #5c5c5c; --line: #c8c8c8; --link: #0b57a4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #161616; --faint: #a0a0a0; --line: #444; --link: #8ab8ee; }
}
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.45 system-ui, sans-serif; }
a { color: var(--link); }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin-bottom: 0.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; border-bottom: 2px solid var(--ink); font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); padding-bottom: 0.5rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(70rem, 92vw); }
thead { border-top: 2px solid var(--ink); border-bottom: 1px solid var(--ink); }
tbody + tbody { border-top: 1px solid var(--line); }
th, td { padding: 0.25rem 0.6rem; white-space: nowrap; }
th { font-weight: 600; } tbody th { font-weight: 400; }
thead th { white-space: normal; vertical-align: bottom; } .scroll + .scroll { margin-top: 1.5rem; }
tbody th[scope=row] { position: sticky; left: 0; background: var(--paper); white-space: normal; min-width: 8rem; }
tbody th[scope=rowgroup] { font-style: italic; color: var(--faint); }
.left { text-align: left; } .center { text-align: center; } .right { text-align: right; }
.reported { font-style: italic; color: var(--faint); }
.notes, .about { color: var(--faint); font-size: 0.9rem; padding-left: 1.2rem; } .about { padding: 0; margin: 0.2rem 0; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; max-width: min(100%, 30rem); }
figure img { max-width: min(100%, 28rem); background: #fff; padding: 0.5rem; border: 1px solid var(--line); }
.small img { max-width: 11rem; max-height: 9rem; } figcaption { color: var(--faint); font-size: 0.85rem; }
.problem { border-left: 4px solid #d55e00; padding-left: 0.6rem; }
code { overflow-wrap: anywhere; } pre { white-space: pre-wrap; } pre code { font-size: 0.9rem; }
"""


# A wide table scrolls by itself, by keyboard too.
_SCROLL = '<div class="scroll" role="region" aria-label="Table" tabindex="0">'


def page(title: str, body: Iterable[str]) -> str:
    """A whole document around lines of HTML."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape_html(title)}</title>",
            f"<style>\n{_STYLE}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def standalone(text: str, folder: Path) -> str:
    """A page that shows its figures wherever it lies: pictures from `folder` are put inside, links to files are taken off."""
    text = text.replace(_TO_INDEX, "")

    def inside(found: re.Match[str]) -> str:
        path = folder / unquote(unescape(found[1]))
        if not path.is_file():
            return found[0]
        return f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"'

    text = re.sub(r'<a href="(?!https?:)[^"]*">(.*?)</a>', r"\1", text)
    return re.sub(r'src="([^":]+\.png)"', inside, text)


def link(target: str, text: str) -> str:
    """A link to a file, by its path from the page."""
    return f'<a href="{escape_html(quote(target))}">{escape_html(text)}</a>'


def pictures(paths: Sequence[str], *, small: bool = False) -> list[str]:
    """Figures by the paths of their PNG files, each a link to the PDF beside it."""
    if not paths:
        return []
    lines = [f'<div class="figures{" small" if small else ""}">']
    for path in paths:
        what = PurePosixPath(path).stem
        lines.append(
            f'<figure><a href="{escape_html(quote(path.removesuffix(".png")))}.pdf">'
            f'<img src="{escape_html(quote(path))}" alt="{escape_html(what)}" loading="lazy"></a>'
            f"<figcaption>{escape_html(what)}</figcaption></figure>"
        )
    return [*lines, "</div>"]


def plain_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of words and numbers under their titles."""
    heads = "".join(f'<th scope="col" class="left">{escape_html(title)}</th>' for title in titles)
    lines = [_SCROLL, "<table>", f"<thead>\n<tr>{heads}</tr>\n</thead>", "<tbody>"]
    for row in rows:
        cells = "".join(f'<td class="left">{escape_html(cell)}</td>' for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return [*lines, "</tbody>", "</table>", "</div>"]


def notes_list(notes: Iterable[str]) -> list[str]:
    """Notes under their heading."""
    return ["<h2>Notes</h2>", '<ul class="notes">', *(f"<li>{escape_html(note)}</li>" for note in notes), "</ul>"]


_TO_INDEX = f'<p class="about">{link("../index.html", "All tables")}</p>'


def head(title: str) -> list[str]:
    """The beginning of a page that lies one folder below the index."""
    return [_TO_INDEX, f"<h1>{escape_html(title)}</h1>"]


def table_page(table: Table, figures: Sequence[str] = ()) -> str:
    """A table with its notes, its figures, and links to the other formats."""
    layout = table.layout
    formats = {".csv": "numbers (CSV)", ".runs.csv": "runs (CSV)", ".tex": "LaTeX", ".md": "Markdown"}
    files = [link(f"{layout.name}{ending}", what) for ending, what in formats.items()]
    details = table.details
    body = [
        *head(layout.title),
        *_table(table),
        *notes_list(table.notes),
        *(["<h2>Differences</h2>"] if details else []),
        *(line for one in details for line in _table(one)),
        f"<p>Files: {', '.join(files)}.</p>",
        *pictures(figures),
    ]
    return page(layout.title, body)


def _table(table: Table) -> list[str]:
    columns = table.columns
    lines = [_SCROLL, "<table>"]
    # in a span, the words stay in sight while a wide table scrolls
    lines.append(f"<caption><span>{escape_html(table.layout.question or table.layout.title)}</span></caption>")
    heads = [f'<th scope="col" class="{column.align}">{escape_html(column.title)}</th>' for column in columns]
    lines += ["<thead>", f"<tr>{''.join(heads)}</tr>", "</thead>"]
    for section, rows in table.blocks():
        lines.append("<tbody>")
        if section:
            span = f'<th scope="rowgroup" class="left" colspan="{len(columns)}">{escape_html(section)}</th>'
            lines.append(f"<tr>{span}</tr>")
        lines += [_row(row, columns) for row in rows]
        lines.append("</tbody>")
    return [*lines, "</table>", "</div>"]


def _row(row: Sequence[Cell], columns: Sequence[Column]) -> str:
    cells = [f'<th scope="row" class="left">{escape_html(row[0].text)}</th>']
    for cell, column in zip(row[1:], columns[1:], strict=True):
        text = escape_html(cell.text)
        cells.append(f'<td class="{column.align}">{f"<strong>{text}</strong>" if cell.bold else text}</td>')
    reported = ' class="reported"' if row[0].italic else ""
    return f"<tr{reported}>{''.join(cells)}</tr>"
