"""A sweep as one HTML page: effects of what was varied, parallel coordinates, tables.

Widths are per cent of the page's, so that text keeps its size on a phone.
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from alignx_jax.evaluation.pictures import CSS, RUN_COLOURS, share_curves
from alignx_jax.evaluation.report import page, section
from alignx_jax.files import write_text
from alignx_jax.sweeps import table
from alignx_jax.sweeps.space import plain
from alignx_jax.sweeps.table import Row

MANY = 8  # more values of a number than this are points along an axis, not a line each
# A fifth of the trials each, from the worst to the best.
_COLOURS = """
.q0 { --c: #b8442f } .q1 { --c: #cf8a2e } .q2 { --c: #8b8f98 } .q3 { --c: #4a94d8 }
.q4 { --c: #1650a0 }
@media (prefers-color-scheme: dark) { .q4 { --c: #8ec5ff } .q3 { --c: #4a7fc0 } }
.trial { stroke: var(--c); stroke-width: 1.6; opacity: .75 } .trial:hover { stroke-width: 4 }
.dot { fill: var(--soft); opacity: .45 } .mean { fill: var(--ink) }
.axis { stroke: var(--soft); stroke-width: 1 }
"""


def write_page(path: Path, rows: Sequence[Row], *, title: str, command: str) -> None:
  """Writes sweep.html, atomically.

  Args:
    command: what to type for the same, or to go on with it.
  """
  sections = [section("Settings", _settings_table(rows))]
  factors = table.varied(rows)
  if factors and any(row.finished for row in rows):
    effects = "".join(
      f"<div><h3>{escape(factor)}</h3>{effect_plot(rows, factor)}</div>" for factor in factors
    )
    note = (
      "Dot: mean over the other factors. Whisker: 95 % interval by Student's t over seeds, where "
      "there are two or more. Faint: single trials."
    )
    panels = f'<div class="panels">{effects}</div><p class="note">{note}</p>'
    sections.append(section("Effect of each factor on alignment accuracy, %", panels))
    for factor in factors:
      if "<svg" in (drawn := factor_curves(rows, factor)):
        sections.append(section(f"Alignment accuracy by {factor}", drawn))
    sections.append(section("Every finished trial", parallel_coordinates(rows)))
  if failed := table.failures(rows):
    told = "".join(
      f"<p><b>{escape(row.trial.name)}</b>: {escape(row.outcome['reason'])}</p>" for row in failed
    )
    sections.append(section("Failed", told))
  sections.append(section("Trials", _trials_table(rows)))
  sections.append(section("Reproduce, or go on", f"<pre>{escape(command)}</pre>"))
  write_text(path, page(title, summary(rows), "\n".join(sections), css=CSS + _COLOURS))


def summary(rows: Sequence[Row]) -> str:
  """One sentence."""
  statuses = [row.outcome["status"] for row in rows]
  told = ", ".join(f"{statuses.count(kind)} {kind}" for kind in dict.fromkeys(statuses))
  means = {label: table.mean_of(group) for label, group in table.settings(rows).items()}
  means = {label: mean for label, mean in means.items() if mean}
  if not means:
    return f"{len(rows)} trials: {told}."
  best = max(means, key=lambda label: means[label].mean)
  over = f" over {means[best].seeds} seeds" if means[best].seeds > 1 else ""
  return (
    f"{len(rows)} trials: {told}. Most accurate was {best}, with "
    f"{table.in_percent(means[best])} % of the test pairs{over}."
  )


# ------------------------------------------------------------------ effects


def effect_plot(rows: Sequence[Row], factor: str) -> str:
  """An SVG of the accuracy at each value of a factor."""
  values = table.values_of(rows, factor)
  if len(values) > MANY and table.are_numbers(values):
    return _scatter(rows, factor, values)
  found = table.effects(rows, factor)
  seen = [x for mean, each in found.values() for x in (*each, mean.low, mean.high)]
  at, ticks = _scale([x for x in seen if not math.isnan(x)])
  parts, y = [], 0
  for value, (mean, each) in found.items():
    parts.append(
      f'<text class="soft" y="{y + 13}">{escape(plain(value))}</text>'
      f'<text class="soft end" x="100%" y="{y + 13}">{table.in_percent(mean)}</text>'
    )
    middle = y + 26
    parts += [f'<circle class="dot" cx="{at(x)}" cy="{middle}" r="3"/>' for x in each]
    if not math.isnan(mean.low):
      low, high = at(mean.low), at(mean.high)
      parts.append(f'<line class="whisker" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"/>')
    parts.append(f'<circle class="mean" cx="{at(mean.mean)}" cy="{middle}" r="5"/>')
    y += 42
  grid = _grid(ticks, at, y)
  label = escape(f"Accuracy by {factor}", quote=True)
  return f'<svg role="img" aria-label="{label}" height="{y + 22}">{grid}{"".join(parts)}</svg>'


def factor_curves(rows: Sequence[Row], factor: str) -> str:
  """An SVG of the accuracy by a factor of three to MANY numbers, a line for each other setting.

  "" where it has others, or other factors make more lines than can be told apart.
  """
  values = table.values_of(rows, factor)
  if not 3 <= len(values) <= MANY or not table.are_numbers(values):
    return ""
  lines = {}
  for group in table.settings(rows).values():
    if mean := table.mean_of(group):
      factors = dict(table.setting(group[0]))
      value = factors.pop(factor)
      told = (f"{name} {plain(x)}" for name, x in factors.items() if name in table.varied(rows))
      # A single trial without pairs has no interval.
      low, high = (mean.mean if math.isnan(x) else x for x in (mean.low, mean.high))
      result = {"accuracy": mean.mean, "low": low, "high": high}
      lines.setdefault(", ".join(told) or "all", {})[value] = result
  return share_curves(lines, across=factor) if lines and len(lines) <= RUN_COLOURS else ""


def _scatter(rows, factor, values) -> str:
  """Accuracy, upwards, against a number with many values."""
  finished = [row for row in rows if row.finished]
  across, log = _number_axis(values)
  at, ticks = _scale([row.outcome["accuracy"] for row in finished])
  height = 180
  up = lambda x: height - float(at(x)[:-1]) / 100 * height
  points = "".join(
    f'<circle class="mean" cx="{across(row.trial.factors[factor])}" '
    f'cy="{up(row.outcome["accuracy"]):.1f}" r="3.5"><title>{escape(row.trial.name)}</title>'
    "</circle>"
    for row in finished
  )
  lines = "".join(
    f'<line class="grid" x1="0" x2="100%" y1="{up(x):.1f}" y2="{up(x):.1f}"/>'
    f'<text class="soft" y="{up(x) - 3:.1f}">{100 * x:g}</text>'
    for x in ticks
  )
  ends = (
    f'<text class="soft" y="{height + 18}">{plain(min(values))}</text>'
    f'<text class="soft middle" x="50%" y="{height + 18}">{"by factors" if log else ""}</text>'
    f'<text class="soft end" x="100%" y="{height + 18}">{plain(max(values))}</text>'
  )
  label = escape(f"Accuracy by {factor}", quote=True)
  return f'<svg role="img" aria-label="{label}" height="{height + 24}">{lines}{points}{ends}</svg>'


def _scale(values):
  """From accuracy to per cent of the width, over the range there is; and round ticks within."""
  low, high = min(values), max(values)
  room = max(0.01, 0.06 * (high - low))
  low, high = max(0.0, low - room), min(1.0, high + room)
  step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / s <= 5)
  ticks = [round(i * step, 2) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
  return lambda x: f"{2 + 96 * (x - low) / (high - low):.2f}%", ticks


def _grid(ticks, at, height):
  return "".join(
    f'<line class="grid" x1="{at(x)}" x2="{at(x)}" y1="0" y2="{height}"/>'
    f'<text class="soft middle" x="{at(x)}" y="{height + 16}">{100 * x:g}</text>'
    for x in ticks
  )


def _number_axis(values):
  """From a number to per cent of the width, by factors where it spans many; whether so."""
  low, high = min(values), max(values)
  log = low > 0 and high / low >= 30
  place = math.log if log else float
  span = (place(high) - place(low)) or 1.0
  return lambda x: f"{4 + 92 * (place(x) - place(low)) / span:.2f}%", log


# ------------------------------------------------------------------ parallel coordinates


def parallel_coordinates(rows: Sequence[Row]) -> str:
  """An SVG with an axis for each varied factor, one under the other, accuracy last.

  A line is a trial. The axes lie, so that they fit a phone.
  """
  finished = sorted((r for r in rows if r.finished), key=lambda row: row.outcome["accuracy"])
  factors = [*table.varied(rows)]
  if len(table.values_of(rows, table.SEED)) > 1:
    factors.insert(0, table.SEED)
  axes = [(factor, *_axis(rows, finished, factor)) for factor in factors]
  at, ticks = _scale([row.outcome["accuracy"] for row in finished])
  labels = [(at(x), f"{100 * x:g}") for x in ticks]
  axes.append(("accuracy %", labels, lambda row: at(row.outcome["accuracy"])))
  gap, top, parts = 84, 26, []
  for i, row in enumerate(finished):
    ends = [place(row) for _, _, place in axes]
    title = escape(f"{row.trial.name}: {table.percent(row.outcome['accuracy'])} %")
    lines = "".join(
      f'<line x1="{a}" x2="{b}" y1="{top + gap * k}" y2="{top + gap * (k + 1)}"/>'
      for k, (a, b) in enumerate(zip(ends, ends[1:], strict=False))
    )
    fifth = min(4, 5 * i // len(finished))
    parts.append(f'<g class="trial q{fifth}"><title>{title}</title>{lines}</g>')
  for k, (name, labels, _) in enumerate(axes):
    y = top + gap * k
    parts.append(
      f'<line class="axis" x1="0" x2="100%" y1="{y}" y2="{y}"/>'
      f'<text class="head" y="{y - 10}">{escape(name)}</text>'
    )
    for j, (x, text) in enumerate(labels):
      # Neighbours stand on two levels where they are many.
      level = y + 16 + (14 if len(labels) > 4 and j % 2 else 0)
      parts.append(
        f'<circle class="mean" cx="{x}" cy="{y}" r="2.5"/>'
        f'<text class="soft {_anchor(x)}" x="{x}" y="{level}">{escape(text)}</text>'
      )
  height = top + gap * (len(axes) - 1) + 36
  key = "".join(
    f'<li><svg viewBox="0 0 28 10" aria-hidden="true"><g class="trial q{i}">'
    f'<line x1="1" x2="27" y1="5" y2="5"/></g></svg>{text}</li>'
    for i, text in enumerate(("worst fifth", "", "", "", "best fifth"))
  )
  return (
    f'<ul class="key">{key}</ul><svg role="img" aria-label="Parallel coordinates of the trials" '
    f'height="{height}">{"".join(parts)}</svg>'
  )


def _axis(rows, finished, factor):
  """Labels of a factor's axis with their places, and from a finished row to its place."""
  values = table.values_of(rows, factor)
  if len(values) > MANY and table.are_numbers(values):
    across, _ = _number_axis(values)
    labels = [(across(value), plain(value)) for value in (values[0], values[-1])]
    return labels, lambda row: across(row.trial.factors[factor])
  labels, places = [], {}
  for i, value in enumerate(values):
    middle = 10 + 80 * i / max(1, len(values) - 1)
    labels.append((f"{middle:.2f}%", plain(value)))
    # Side by side, the worst first, so that a line can be followed.
    here = [row for row in finished if row.trial.factors.get(factor) == value]
    for j, row in enumerate(here):
      places[row.trial.name] = f"{middle + 9 * ((j + 0.5) / len(here) - 0.5):.2f}%"
  return labels, lambda row: places[row.trial.name]


def _anchor(x: str) -> str:
  share = float(x[:-1])
  return "" if share < 8 else "end" if share > 92 else "middle"


# ------------------------------------------------------------------ tables


def _settings_table(rows) -> str:
  return _html(table.HEADINGS, table.text_rows(rows), numbers=(1, 2, 3))


def _trials_table(rows) -> str:
  heads = ("trial", "status", "accuracy %", "steps", "seconds")
  cells = [
    (
      row.trial.name,
      row.outcome["status"],
      table.percent(row.outcome.get("accuracy", math.nan)),
      str(row.outcome.get("steps", "–")),
      f"{row.outcome['seconds']:.0f}" if "seconds" in row.outcome else "–",
    )
    for row in rows
  ]
  body = _html(heads, cells, numbers=(2, 3, 4))
  return f"<details><summary>Show all {len(rows)}</summary>{body}</details>"


def _html(heads, lines, *, numbers) -> str:
  classes = [' class="number"' if i in numbers else "" for i in range(len(heads))]
  head = "".join(f"<th{c}>{escape(h)}</th>" for h, c in zip(heads, classes, strict=True))
  body = "".join(
    "<tr>"
    + "".join(f"<td{c}>{escape(x)}</td>" for x, c in zip(cells, classes, strict=True))
    + "</tr>"
    for cells in lines
  )
  return (
    f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
  )
