"""The page that lists every report: settings, tables with their question and headline, sweeps, figures, files."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from analysis.entries import SWEEP, Entry, counted, read_entries
from analysis.escape import escape_html, escape_markdown
from analysis.files import write_texts
from analysis.render.html import link, page, pictures

TITLE = "Tables and figures"
_ENDINGS = {
    ".trials.csv": "trials (CSV)",
    ".runs.csv": "runs (CSV)",
    ".csv": "CSV",
    ".html": "HTML",
    ".md": "Markdown",
    ".tex": "LaTeX",
}
_STALE = "Could not be written again, so that files below are of an earlier report: "
_FAILED = "Could not be written: "


def write_index(reports: Path) -> list[Path]:
    """Write index.html and index.md from what lies in `reports`; the same reports give the same bytes."""
    written: list[Path] = []
    entries = None
    # another process may have added its report while this one wrote
    while (found := read_entries(reports)) != entries:
        entries = found
        written = write_texts(reports, {"index.html": to_html(entries), "index.md": to_markdown(entries)})
    return written


def to_html(entries: list[Entry]) -> str:
    """One page with a section for each setting."""
    body = [f"<h1>{TITLE}</h1>", f'<p class="about">{escape_html(counted(entries)) or "Nothing was reported yet"}.</p>']
    for setting, group in groupby(entries, key=lambda entry: entry.setting):
        body += [f"<h2>{escape_html(setting)}</h2>"]
        for entry in group:
            body += _html_entry(entry)
    return page(TITLE, body)


def _html_entry(entry: Entry) -> list[str]:
    main = _main_file(entry)
    name = link(f"{entry.setting}/{main}", entry.name) if main else escape_html(entry.name)
    lines = [f"<section>\n<h3>{name}{' (sweep)' if entry.kind == SWEEP else ''}</h3>"]
    if entry.question:
        lines.append(f"<p>{escape_html(entry.question)}</p>")
    if entry.problem:
        lines.append(f'<p class="problem">{escape_html(_problem(entry))}</p>')
    if entry.facts:
        told = [f"{escape_html(what)}: {_html_fact(what, text)}" for what, text in entry.facts.items()]
        lines.append(f'<p class="about">{"; ".join(told)}.</p>')
    if entry.files:
        files = [link(f"{entry.setting}/{file}", _ending(entry, file)) for file in entry.files]
        lines.append(f'<p class="about">Files: {", ".join(files)}.</p>')
    lines += pictures([f"{entry.setting}/{figure}" for figure in entry.figures], small=True)
    return [*lines, "</section>"]


def to_markdown(entries: list[Entry]) -> str:
    """The same page in Markdown."""
    lines = [f"# {TITLE}", "", f"{escape_markdown(counted(entries)) or 'Nothing was reported yet'}."]
    for setting, group in groupby(entries, key=lambda entry: entry.setting):
        lines += ["", f"## {escape_markdown(setting)}"]
        for entry in group:
            lines += ["", f"### {escape_markdown(entry.name)}{' (sweep)' if entry.kind == SWEEP else ''}", ""]
            if entry.question:
                lines += [escape_markdown(entry.question), ""]
            if entry.problem:
                lines += [f"**{escape_markdown(_problem(entry))}**", ""]
            lines += [f"- {escape_markdown(what)}: {escape_markdown(text)}" for what, text in entry.facts.items()]
            files = [f"[{_ending(entry, file)}](<{entry.setting}/{file}>)" for file in entry.files]
            files += [f"[{figure.removesuffix('.png')}](<{entry.setting}/{figure}>)" for figure in entry.figures]
            if files:
                lines.append(f"- Files: {', '.join(files)}")
    return "\n".join(lines).rstrip() + "\n"


def _main_file(entry: Entry) -> str:
    """The page to read: HTML before Markdown."""
    return next((file for ending in (".html", ".md") for file in entry.files if file.endswith(ending)), "")


def _ending(entry: Entry, file: str) -> str:
    return _ENDINGS.get(file.removeprefix(entry.name), file)


def _problem(entry: Entry) -> str:
    return f"{_STALE if entry.files else _FAILED}{entry.problem}"


def _html_fact(what: str, text: str) -> str:
    shown = escape_html(text)
    return f"<code>{shown}</code>" if what in ("command", "code", "plan", "study") else shown
