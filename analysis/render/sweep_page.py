"""The report of a sweep as a page of HTML."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.escape import escape_html
from analysis.render.html import head, link, notes_list, page, pictures, plain_table
from analysis.sweeps import SweepResult, cells, command, notes, ranked, titles, values_text


def sweep_page(result: SweepResult, figures: Sequence[str]) -> str:
    """Best trials, importance, every trial, notes and figures; `figures`: names of PNG files beside the page."""
    body = [*head(result.name), f"<p>{escape_html(result.question)}</p>"]
    for trial in result.best:
        body.append(f"<p>Best: trial {trial.number}, {escape_html(values_text(result, trial))}:</p>")
        body.append(f"<pre><code>{escape_html(command(result, trial))}</code></pre>")
    if result.first is not None:
        told = escape_html(values_text(result, result.first))
        body.append(f"<p>The configuration that the sweep started from is trial {result.first.number}: {told}.</p>")
    for one, shares in zip(result.metrics, result.importance, strict=True):
        if shares:
            rows = [(key, f"{100 * share:.1f} %") for key, share in shares.items()]
            body += plain_table(["setting", f"share of the variance of {one.label}"], rows)
            complete = len(result.complete)
            body.append(f"<p>By fANOVA over {complete} complete trials, each setting alone; shares sum to 100 %.</p>")
    body += plain_table(titles(result), [cells(result, trial) for trial in ranked(result)])
    body.append('<p class="about">In brackets: the last value before a trial was left.</p>')
    files = [link(f"{result.name}.trials.csv", "trials (CSV)"), link(f"{result.name}.md", "Markdown")]
    body += [*notes_list(notes(result)), f"<p>Files: {', '.join(files)}.</p>", *pictures(figures)]
    return page(result.name, body)
