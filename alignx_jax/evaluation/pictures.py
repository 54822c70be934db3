"""Inline SVG of accuracy bars and training curves; `report.css` gives the colours."""

import math
from html import escape
from pathlib import Path

from alignx_jax.evaluation.results import EMPTY, LEGEND, check, interval, percent
from alignx_jax.files import write_text

CSS = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
# Metric, heading, reference value, its label, and the label's shift from the line in SVG units.
PANELS = (
  ("loss", "Loss, nats", math.log(2), "log 2 = 0.693", -5),
  ("reward_accuracy", "Reward accuracy", 0.5, "chance", 13),
  ("margin", "Margin, nats", 0.0, "as the reference", 13),
)
RUN_COLOURS = 6  # .run0 to .run5 in CSS; further runs repeat them dashed
DASHES = ("none", "7 4", "2 4")


def write_picture(path, results) -> None:
  """Writes the accuracy bars as an SVG file that stands alone, 720 wide.

  Raises:
    ValueError: there are no results, or one of them cannot be shown.
  """
  check(results)
  if not results:
    raise ValueError("There are no results to draw.")
  write_svg(path, accuracy_bars(results))


def write_svg(path, picture) -> None:
  """Writes the first SVG of a picture as a file that stands alone, 720 wide."""
  svg = picture.split("</svg>")[0] + "</svg>"
  frame = '<svg xmlns="http://www.w3.org/2000/svg" width="720" style="width:720px"'
  font = "svg { font-family: system-ui, sans-serif; background: var(--card) }"
  svg = svg.replace("<svg", frame, 1).replace(">", f"><style>{CSS}{font}</style>", 1)
  write_text(path, svg + "\n")


def accuracy_bars(results):
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
      value = f"{percent(r)} % {interval(r)}"
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


def html_table(markdown: str) -> str:
  """A Markdown table as HTML; all columns but the first hold figures."""
  heads, _, *lines = (
    [escape(cell.strip()) for cell in line.strip("| ").split(" | ")]
    for line in markdown.splitlines()
  )
  row = lambda kind, cells: "".join(
    f"<{kind}{' class=number' if i else ''}>{cell}</{kind}>" for i, cell in enumerate(cells)
  )
  body = "".join(f"<tr>{row('td', cells)}</tr>" for cells in lines)
  return (
    f'<div class="scroll"><table><thead><tr>{row("th", heads)}</tr></thead>'
    f"<tbody>{body}</tbody></table></div>"
  )


def share_curves(lines, *, across: str, up: str = "Alignment accuracy, %") -> str:
  """Shares by what was varied, each with its interval: one SVG of 720 by 300 units, a line each.

  Args:
    lines: name -> {value: result}, of results with "accuracy", "low" and "high". Values stand
      side by side in ascending order, however far apart they are.
    across: what the values are.
  """
  values = sorted({value for results in lines.values() for value in results})
  if not values:
    return f"<p>{EMPTY}</p>"
  left, right, top, bottom = 44, 700, 16 + 18 * -(-len(lines) // 4), 250
  at_x = {
    v: left + 24 + i * (right - left - 48) / max(1, len(values) - 1) for i, v in enumerate(values)
  }
  at_y = lambda share: bottom - share * (bottom - top)
  grid = "".join(
    f'<line class="{kind}" x1="{left}" x2="{right}" y1="{at_y(s):g}" y2="{at_y(s):g}"/>'
    f'<text class="soft end" x="{left - 6}" y="{at_y(s) + 4:g}">{100 * s:g}</text>'
    for s, kind in ((0, "grid"), (0.25, "grid"), (0.5, "mark"), (0.75, "grid"), (1, "grid"))
  ) + "".join(
    f'<text class="soft middle" x="{x:.1f}" y="{bottom + 18}">{escape(f"{v:g}")}</text>'
    for v, x in at_x.items()
  )
  drawn, key = [], []
  for i, (name, results) in enumerate(lines.items()):
    cycle, colour = divmod(i, RUN_COLOURS)
    style = f'class="curve run{colour}" stroke-dasharray="{DASHES[cycle % len(DASHES)]}"'
    points = [(at_x[v], results[v]) for v in sorted(results)]
    # A lone point, drawn as a line to itself, shows as a round dot.
    corners = " ".join(f"{x:.1f},{at_y(r['accuracy']):.1f}" for x, r in points + points[-1:])
    drawn.append(f'<path {style} d="M{corners}"/>')
    for x, r in points:
      x += 3 * (i - (len(lines) - 1) / 2)  # beside one another
      drawn.append(
        f"<g><title>{escape(str(name))}: {percent(r)} % {interval(r)}</title>"
        f'<line class="curve run{colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{at_y(r["low"]):.1f}" '
        f'y2="{at_y(r["high"]):.1f}"/><circle class="bubble run{colour}" cx="{x:.1f}" '
        f'cy="{at_y(r["accuracy"]):.1f}" r="3.5"/></g>'
      )
    x, y = left + 24 + 165 * (i % 4), 8 + 18 * (i // 4)
    key.append(
      f'<path {style} d="M{x} {y}H{x + 26}"/>'
      f'<text class="soft" x="{x + 32}" y="{y + 4}">{escape(str(name))}</text>'
    )
  return (
    f'<svg role="img" aria-label="{escape(up)} by {escape(across, quote=True)}" '
    f'viewBox="0 0 720 300">{grid}{"".join(drawn)}{"".join(key)}'
    f'<text class="soft middle" x="{(left + right) / 2:g}" y="{bottom + 40}">{escape(across)}'
    f'</text></svg><p class="note">{escape(up)}. Whiskers: 95 % interval. '
    "Dashed: chance.</p>"
  )


def training_curves(curves):
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
