"""Measured results to what a person looks at: a Markdown table and one HTML page.

The page is a single file that opens offline: inline SVG and CSS, no script, nothing fetched.
Needs the standard library only, so a report can be made where JAX is not installed.

A result is a dict: "policy", "condition", "protocol" (strings, see LEGEND), "accuracy" with
its 95 % bootstrap interval "low" to "high" (shares, 0 to 1), and "examples", how many pairs
were scored. Other keys are ignored.
"""

import json
import math
import os
from html import escape
from pathlib import Path

LEGEND = {
  "policy": {
    "base": "the model before alignment",
    "ica": "in-context alignment: trained to read the raw persona P",
    "pba": "preference-bridged alignment: trained to read P̃, the user's preference directions",
    "length": "a control, no model",
  },
  "condition": {
    "persona": "the policy reads the raw persona (ICA)",
    "inferred": "P̃ inferred from the history (PBA)",
    "golden": "P̃ from the record's label, the ceiling",
    "shuffled": "another user's persona or P̃, the floor",
    "none": "no persona",
    "length": "the longer response wins, no model",
  },
  "protocol": {
    "matched": "reference scored on the same prompt",
    "release": "reference scored on the raw-persona prompt, as the AlignX release does",
    "unconditioned": "the reference is the untrained base without any persona",
  },
}
# Metric, heading, reference value, its label, and the label's shift from the line in SVG units.
PANELS = (
  ("loss", "Loss, nats", math.log(2), "log 2 = 0.693", -5),
  ("reward_accuracy", "Reward accuracy", 0.5, "chance", 13),
  ("margin", "Margin, nats", 0.0, "as the reference", 13),
)
COLUMNS = ("policy", "condition", "protocol", "accuracy % [95 % CI]", "pairs")
EMPTY = "nothing measured"
RUN_COLOURS = 6  # .run0 to .run5 in CSS; further runs repeat them dashed
DASHES = ("none", "7 4", "2 4")

CSS = """
:root { color-scheme: light dark; --page: #f6f6f3; --card: #fff; --ink: #1a1a19; --soft: #595955;
  --line: #d9d8d2; }
.ica { --c: #2a78d6 } .pba { --c: #d9591f } .base { --c: #7b7f86 } .length { --c: #a99b7a }
.run0 { --c: #12906a } .run1 { --c: #c23f83 } .run2 { --c: #5a49bd } .run3 { --c: #9a6c00 }
.run4 { --c: #cf3b3b } .run5 { --c: #13869c }
@media (prefers-color-scheme: dark) {
  :root { --page: #121211; --card: #1c1c1b; --ink: #f2f1ec; --soft: #b4b3ac; --line: #3a3a37 }
  .ica { --c: #4a94ee } .pba { --c: #ea7440 } .base { --c: #8d929b } .length { --c: #a3946f }
  .run0 { --c: #24ad82 } .run1 { --c: #e16aa6 } .run2 { --c: #9c8ff0 } .run3 { --c: #cb9717 }
  .run4 { --c: #ee7070 } .run5 { --c: #35a9c0 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 1120px; margin: auto; padding: 24px 16px 48px }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 0 0 12px; overflow-wrap: anywhere }
h3 { font-size: .9rem; margin: 0 0 4px }
p { margin: 0 0 8px; max-width: 75ch; overflow-wrap: anywhere; white-space: pre-line }
.summary { font-size: 1.1rem; margin-bottom: 20px }
.note { color: var(--soft); font-size: .85rem }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px; margin-bottom: 16px; min-width: 0 }
.pair { display: grid; gap: 0 16px; grid-template-columns: minmax(0, 1fr) }
@media (min-width: 960px) { .pair { grid-template-columns: repeat(2, minmax(0, 1fr)) } }
.panels { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(290px,
  100%), 1fr)) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 6px 8px 6px 0; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600; white-space: nowrap }
.number { text-align: right; padding: 6px 0 6px 8px } td.number { white-space: nowrap }
.interval { color: var(--soft) }
@media (max-width: 520px) { section { padding: 12px } th.number { white-space: normal }
  table { font-size: .77rem } .interval { display: block } }
dl { margin: 0; font-size: .875rem }
dl > div { display: grid; grid-template-columns: 8.5em 1fr; gap: 8px; padding: 2px 0 }
dt { font-weight: 600; overflow-wrap: anywhere } dd { margin: 0; overflow-wrap: anywhere }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0 0 12px; padding: 0;
  list-style: none; font-size: .875rem }
.key svg { width: 28px; height: 10px; margin-right: 6px; display: inline }
pre { margin: 0 0 12px; padding: 12px; background: var(--page); border-radius: 6px;
  font: .8rem/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere }
summary { cursor: pointer } details pre { margin-top: 12px }
svg { display: block; width: 100%; overflow: visible }
svg text { fill: var(--ink); font-size: 13px; paint-order: stroke; stroke: var(--card);
  stroke-width: 4px; stroke-linejoin: round }
svg .soft { fill: var(--soft); font-size: 12px } svg .head { font-weight: 700 }
.end { text-anchor: end } .middle { text-anchor: middle }
.grid { stroke: var(--line) } .mark { stroke: var(--ink); stroke-dasharray: 4 4 }
.bar { fill: var(--c) } .whisker { stroke: var(--ink); stroke-width: 1.5 }
.halo { stroke: var(--card); stroke-width: 4; opacity: .75 }
.curve { stroke: var(--c); stroke-width: 2; fill: none; stroke-linecap: round;
  stroke-linejoin: round }
.faint { stroke-width: 1; opacity: .4 } .dot { stroke-width: 7 }
"""


def format_table(results) -> str:
  """The results, in the order given, as a Markdown table that also reads well in a terminal.

  Raises:
    ValueError: a result lacks a key, or a share is not within 0 to 1.
  """
  _check(results)
  if not results:
    return EMPTY
  plain = lambda text: " ".join(str(text).split()).replace("|", "\\|")
  rows = [
    (*(plain(r[key]) for key in COLUMNS[:3]), f"{_percent(r)} {_interval(r)}", str(r["examples"]))
    for r in results
  ]
  widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
  line = lambda cells: "| " + " | ".join(cells) + " |"
  fit = lambda row: [
    cell.ljust(width) if i < 3 else cell.rjust(width)
    for i, (cell, width) in enumerate(zip(row, widths, strict=True))
  ]
  rule = ["-" * width if i < 3 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
  return "\n".join(line(cells) for cells in (fit(COLUMNS), rule, *map(fit, rows)))


def write_results(path, results) -> None:
  """Writes the results, every key of them, as a JSON list; atomically.

  Raises:
    ValueError: a number is NaN or infinite, which JSON cannot hold.
  """
  number = lambda value: value.item()  # NumPy and JAX scalars
  _write(path, json.dumps(list(results), indent=1, allow_nan=False, default=number) + "\n")


def write_report(
  path, *, title, summary, results, curves, config, command, versions, sections=()
) -> None:
  """Writes the HTML page, atomically. All text is escaped here: give it raw.

  Args:
    path: the file to write; its folder is made if need be.
    title: one line.
    summary: one sentence that says what came out.
    results: see the module's docstring; may be empty.
    curves: run name -> dicts with "step" and any of "loss", "reward_accuracy", "margin".
    config: a string, or a dict or ConfigDict to show as JSON.
    command: what to type to reproduce the page.
    versions: package name -> version.
    sections: (heading, list of paragraphs) pairs, shown in order after the curves.
  Raises:
    ValueError: a result lacks a key, or a share is not within 0 to 1.
  """
  _check(results)
  if not isinstance(config, str):
    config = config.to_dict() if hasattr(config, "to_dict") else config
    config = json.dumps(config, indent=2, default=str)
  legend = "".join(
    f"<div><h3>{kind.capitalize()}</h3>{_definitions(meanings)}</div>"
    for kind, meanings in LEGEND.items()
  )
  extra = "".join(
    _section(heading, "".join(f"<p>{escape(text)}</p>" for text in paragraphs))
    for heading, paragraphs in sections
  )
  reproduce = f"<pre>{escape(command)}</pre>{_definitions(versions)}"
  details = f"<details><summary>Show</summary><pre>{escape(config)}</pre></details>"
  _write(
    path,
    f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body><main>
<h1>{escape(title)}</h1>
<p class="summary">{escape(summary)}</p>
<div class="pair">
{_section("Alignment accuracy", _html_table(results))}
{_section("The same, drawn", _bars(results))}
</div>
{_section("What the words mean", f'<div class="panels">{legend}</div>')}
{_section("Training", _curves(curves))}
{extra}
{_section("Reproduce", reproduce)}
{_section("Config", details)}
</main></body>
</html>
""",
  )


def _check(results):
  """Raises ValueError on the first result that cannot be shown truthfully."""
  for i, result in enumerate(results):
    for key in ("policy", "condition", "protocol", "accuracy", "low", "high", "examples"):
      if key not in result:
        raise ValueError(f"results[{i}] has no {key!r}: it has {sorted(result)}")
    for key in ("accuracy", "low", "high"):
      if not 0 <= result[key] <= 1:  # NaN fails too
        raise ValueError(f"results[{i}][{key!r}] is {result[key]}: give a share, from 0 to 1")


def _write(path, text):
  """Writes beside `path`, then renames: a reader sees the old file or the new one whole."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    # User text may hold lone surrogates, which UTF-8 cannot.
    temporary.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _percent(result):
  return f"{100 * result['accuracy']:.1f}"


def _interval(result):
  return f"[{100 * result['low']:.1f}, {100 * result['high']:.1f}]"


def _section(heading, body):
  return f"<section><h2>{escape(heading)}</h2>{body}</section>"


def _definitions(meanings):
  pairs = (
    f"<div><dt>{escape(str(word))}</dt><dd>{escape(str(meaning))}</dd></div>"
    for word, meaning in meanings.items()
  )
  return f"<dl>{''.join(pairs)}</dl>"


def _html_table(results):
  if not results:
    return f"<p>{EMPTY}</p>"
  heads = (f"<th{' class=number' if i > 2 else ''}>{c}</th>" for i, c in enumerate(COLUMNS))
  rows = (
    "<tr>"
    + "".join(f"<td>{escape(str(r[key]))}</td>" for key in COLUMNS[:3])
    + f'<td class="number"><b>{_percent(r)}</b> <span class="interval">{_interval(r)}</span></td>'
    + f'<td class="number">{escape(str(r["examples"]))}</td></tr>'
    for r in results
  )
  return (
    f'<div class="scroll"><table><thead><tr>{"".join(heads)}</tr></thead>'
    f"<tbody>{''.join(rows)}</tbody></table></div>"
  )


def _bars(results):
  """Bars grouped by policy. x is in per cent of the width, so text keeps its size on a phone."""
  if not results:
    return f"<p>{EMPTY}</p>"
  groups = {}
  for result in results:
    groups.setdefault(str(result["policy"]), []).append(result)
  bars, labels, y = [], [], 0
  for policy, rows in groups.items():
    labels.append(f'<text class="head" y="{y + 16}">{escape(policy)}</text>')
    y += 24
    colour = policy if policy in LEGEND["policy"] else "run0"
    for r in rows:
      name = escape(f"{r['condition']} · {r['protocol']}")
      value = f"{_percent(r)} % {_interval(r)}"
      low, high = (f"{100 * r[key]:.2f}%" for key in ("low", "high"))
      whisker = "".join(
        f'<line class="{kind}" x1="{a}" x2="{b}" y1="{y + 25 - h}" y2="{y + 25 + h}"/>'
        for kind in ("halo", "whisker")
        for a, b, h in ((low, high, 0), (low, low, 5), (high, high, 5))
      )
      bars.append(
        f'<rect class="bar {colour}" y="{y + 18}" width="{100 * r["accuracy"]:.2f}%" height="14" '
        f'rx="2"><title>{escape(policy)}, {name}: {value}</title></rect>{whisker}'
      )
      labels.append(
        f'<text class="soft" y="{y + 13}">{name}</text>'
        f'<text class="soft end" x="100%" y="{y + 13}">{value}</text>'
      )
      y += 38
    y += 8
  grid = "".join(
    f'<line class="grid" x1="{x}%" x2="{x}%" y1="0" y2="{y}"/>' for x in (0, 25, 50, 75, 100)
  )
  axis = "".join(
    f'<text class="soft {anchor}" x="{x}%" y="{y + 16}">{text}</text>'
    for x, anchor, text in (
      (0, "", "0"),
      (25, "middle", "25"),
      (50, "middle", "50 % chance"),
      (75, "middle", "75"),
      (100, "end", "100 %"),
    )
  )
  chance = f'<line class="mark" x1="50%" x2="50%" y1="0" y2="{y}"/>'
  return (
    f'<svg role="img" aria-label="Alignment accuracy, per cent" height="{y + 22}">'
    f"{grid}{''.join(bars)}{chance}{''.join(labels)}{axis}</svg>"
    '<p class="note">Whiskers: 95 % bootstrap interval.</p>'
  )


def _curves(curves):
  """One SVG a metric, one line a run."""
  if not any(curves.values()):
    return f"<p>{EMPTY}</p>"
  policies = [name for name in curves if name in LEGEND["policy"]]
  others = [name for name in curves if name not in LEGEND["policy"]]
  styles = {name: (name, DASHES[0]) for name in policies}
  for i, name in enumerate(others):
    cycle, colour = divmod(i, RUN_COLOURS)
    styles[name] = f"run{colour}", DASHES[cycle % len(DASHES)]
  key = "".join(
    f'<li><svg viewBox="0 0 28 10" aria-hidden="true"><path class="curve {styles[name][0]}" '
    f'stroke-dasharray="{styles[name][1]}" d="M1 5H27"/></svg>{escape(str(name))}</li>'
    for name in curves
  )
  panels = "".join(
    f"<div><h3>{heading}</h3>{_panel(curves, styles, metric, heading, *mark)}</div>"
    for metric, heading, *mark in PANELS
  )
  return (
    f'<ul class="key">{key}</ul><div class="panels">{panels}</div><p class="note">'
    "By training step. Faint: as measured. Bold: the mean of neighbouring points, for runs of "
    "40 points or more. Dashed: the loss and margin of a policy equal to its reference, "
    "and the accuracy of chance.</p>"
  )


def _panel(curves, styles, metric, heading, mark, mark_label, shift):
  """The SVG of one metric: 360 by 220 units, scaled to its column."""
  given = {
    run: [(e["step"], e[metric]) for e in entries if e.get(metric) is not None]
    for run, entries in curves.items()
  }
  runs = {run: [p for p in points if math.isfinite(p[1])] for run, points in given.items()}
  lost = sum(map(len, given.values())) - sum(map(len, runs.values()))
  note = f'<p class="note">{lost} points were NaN or infinite: not drawn.</p>' if lost else ""
  points = [p for run in runs.values() for p in run]
  if not points:
    return f"<p>{EMPTY}</p>{note}"
  x_low, x_high, x_ticks = _axis([x for x, _ in points], 0)
  y_low, y_high, y_ticks = _axis([mark, *(y for _, y in points)], 0.05)
  left, right, top, bottom = 44, 348, 6, 194
  at_x = lambda x: left + (x - x_low) / (x_high - x_low) * (right - left)
  at_y = lambda y: bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

  def path(points, run, extra=""):
    colour, dash = styles[run]
    # A lone point, drawn as a line to itself, shows as a round dot.
    corners = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points + points[-1:])
    return f'<path class="curve {colour}{extra}" stroke-dasharray="{dash}" d="M{corners}"/>'

  grid = "".join(
    f'<line class="grid" x1="{left}" x2="{right}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>'
    f'<text class="soft end" x="{left - 6}" y="{at_y(y) + 4:.1f}">{y:g}</text>'
    for y in y_ticks
  ) + "".join(
    f'<text class="soft middle" x="{at_x(x):.1f}" y="{bottom + 18}">{x:g}</text>' for x in x_ticks
  )
  lines = []
  for run, points in runs.items():
    if len(points) >= 40:
      lines.append(path(_thin(points), run, " faint"))
    if points:
      lines.append(path(_thin(_smooth(points)), run, " dot" if len(points) == 1 else ""))
  y = at_y(mark)
  return (
    f'<svg role="img" aria-label="{heading} by training step" viewBox="0 0 360 220">{grid}'
    f'<line class="mark" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>{"".join(lines)}'
    f'<text class="soft end" x="{right}" y="{y + shift:.1f}">{mark_label}</text></svg>{note}'
  )


def _smooth(points):
  """Mean of k = n // 40 points to either side; fewer at the start, none after the end."""
  n, k = len(points), len(points) // 40
  totals = [0.0]
  for _, value in points:
    totals.append(totals[-1] + value)
  smooth = []
  for i, (step, _) in enumerate(points):
    reach = min(k, i)
    first, end = i - reach, min(i + reach + 1, n)
    smooth.append((step, (totals[end] - totals[first]) / (end - first)))
  return smooth


def _thin(points, bins=400):
  """Keeps the lowest and the highest of each bin, so that a spike survives on a small page."""
  size = -(-len(points) // bins)
  if size < 3:
    return points
  kept = []
  for start in range(0, len(points), size):
    part = points[start : start + size]
    kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
  return kept


def _axis(values, pad):
  """The range to draw, `pad` of the span wider at both ends, and the round numbers within it."""
  span = (max(values) - min(values)) or 1.0
  low, high = min(values) - pad * span, max(values) + pad * span
  if low == high:
    high = low + span
  power = 10.0 ** math.floor(math.log10(span / 4))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= span / 4 * 0.999)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return low, high, [round(i * step, 12) for i in range(first, last + 1)]
