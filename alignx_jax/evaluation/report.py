"""One HTML page of what a study measured.

A single file that opens offline: inline SVG and CSS, no script, nothing fetched. Needs the
standard library only, so a report can be made where JAX is not installed.
"""

import json
from html import escape

from alignx_jax.evaluation.pictures import CSS, accuracy_bars, training_curves
from alignx_jax.evaluation.published import by_benchmark, column, source
from alignx_jax.evaluation.results import (
  COLUMNS,
  EMPTY,
  LEGEND,
  check,
  interval,
  percent,
)
from alignx_jax.files import write_text


def write_report(
  path, *, title, summary, results, curves, config, command, versions, sections=(), pictures=()
) -> None:
  """Writes the HTML page, atomically. All text is escaped here: give it raw.

  Args:
    path: the file to write; its folder is made if need be.
    title: one line.
    summary: one sentence that says what came out.
    results: see results.py; may be empty.
    curves: run name -> dicts with "step" and any of "loss", "reward_accuracy", "margin".
    config: a string, or a dict or ConfigDict to show as JSON.
    command: what to type to reproduce the page.
    versions: package name -> version.
    sections: (heading, list of paragraphs) pairs, shown in order after the curves.
    pictures: (heading, HTML) pairs, shown before them; from functions of this package, which
      have escaped what they show.
  Raises:
    ValueError: a result lacks a key, or a share is not within 0 to 1.
  """
  check(results)
  drawn = "".join(section(heading, html) for heading, html in pictures)
  extra = drawn + "".join(
    section(heading, "".join(f"<p>{escape(text)}</p>" for text in paragraphs))
    for heading, paragraphs in sections
  )
  body = f"""<div class="pair">
{section("Alignment accuracy", _html_table(results))}
{section("The same, drawn", accuracy_bars(results))}
</div>
{_legend()}
{section("Training", training_curves(curves))}
{extra}
{_reproduce(config, command, versions)}"""
  write_text(path, page(title, summary, body))


def write_benchmark_report(
  path, *, title, summary, results, unscored, config, command, versions
) -> None:
  """Writes the HTML page of benchmarks, atomically. All text is escaped here: give it raw.

  Args:
    results: as in results.py, each with its "benchmark".
    unscored: benchmark -> sentences that say which records were not scored, how many and why.
    title, summary, config, command, versions: as of write_report.
  Raises:
    ValueError: a result lacks a key, or a share is not within 0 to 1.
  """
  check(results)
  groups = by_benchmark(results)
  parts = [
    section(name, f"{_html_table(rows, extra=column())}{_sentences(unscored.get(name, ()))}")
    for name, rows in groups.items()
  ]
  parts += [
    section(name, f"<p>{EMPTY}</p>{_sentences(sentences)}")
    for name, sentences in unscored.items()
    if name not in groups
  ]
  note = (
    f'<p class="note">{escape(source())}. Other models, other data: no comparison of methods.</p>'
  )
  body = f"""{"".join(parts)}
{note}
{_legend()}
{_reproduce(config, command, versions)}"""
  write_text(path, page(title, summary, body))


def _legend():
  """What the words of a table mean."""
  kinds = "".join(
    f"<div><h3>{kind.capitalize()}</h3>{_definitions(meanings)}</div>"
    for kind, meanings in LEGEND.items()
  )
  return section("What the words mean", f'<div class="panels">{kinds}</div>')


def _reproduce(config, command, versions):
  """What to type, versions and the config."""
  if not isinstance(config, str):
    config = config.to_dict() if hasattr(config, "to_dict") else config
    config = json.dumps(config, indent=2, default=str)
  reproduce = f"<pre>{escape(command)}</pre>{_definitions(versions)}"
  details = f"<details><summary>Show</summary><pre>{escape(config)}</pre></details>"
  return f"{section('Reproduce', reproduce)}\n{section('Config', details)}"


def _sentences(sentences):
  return "".join(f'<p class="note">{escape(text)}</p>' for text in sentences)


def page(title, summary, body, *, css=CSS):
  """A whole HTML page that opens offline, of HTML that has been escaped."""
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{css}</style>
</head>
<body><main>
<h1>{escape(title)}</h1>
<p class="summary">{escape(summary)}</p>
{body}
</main></body>
</html>
"""


def section(heading, body):
  """A card of a page."""
  return f"<section><h2>{escape(heading)}</h2>{body}</section>"


def _definitions(meanings):
  pairs = (
    f"<div><dt>{escape(str(word))}</dt><dd>{escape(str(meaning))}</dd></div>"
    for word, meaning in meanings.items()
  )
  return f"<dl>{''.join(pairs)}</dl>"


def _html_table(results, *, extra=None):
  if not results:
    return f"<p>{EMPTY}</p>"
  extra = extra or {}
  names = (*COLUMNS, *extra.values())
  heads = (f"<th{' class=number' if i > 2 else ''}>{c}</th>" for i, c in enumerate(names))
  rows = (
    "<tr>"
    + "".join(f"<td>{escape(str(r[key]))}</td>" for key in COLUMNS[:3])
    + f'<td class="number"><b>{percent(r)}</b> <span class="interval">{interval(r)}</span></td>'
    + f'<td class="number">{escape(str(r["examples"]))}</td>'
    + "".join(f'<td class="number">{escape(str(r[key]))}</td>' for key in extra)
    + "</tr>"
    for r in results
  )
  return (
    f'<div class="scroll"><table><thead><tr>{"".join(heads)}</tr></thead>'
    f"<tbody>{''.join(rows)}</tbody></table></div>"
  )
