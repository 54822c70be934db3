"""Inline SVG of inferred preferences; `report.css` gives the colours."""

import textwrap
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from alignx_jax.evaluation.calibration import AT_LEAST, DIRECTIONS_K, format_preference_table
from alignx_jax.evaluation.pictures import html_table, write_svg
from alignx_jax.evaluation.results import EMPTY
from alignx_jax.personas.preferences import NEUTRAL, PreferenceSpace

# Per cent of the width from the middle, probability 0, to probability 1. What is left of each
# half holds the figures.
REACH = 35
LINE = 15  # Height of a line of text, in px.
POLE_CHARACTERS = 22  # What half a phone's width holds.
MARK = "the record's label"


def write_preference_chart(
  path, space: PreferenceSpace, probabilities_PK, *, truth_P=None, top: int = 20
) -> None:
  """Writes `preference_chart` as an SVG file that stands alone, 720 wide.

  Raises:
    ValueError: see `preference_chart`; or no pole is probable enough to draw.
  """
  picture = preference_chart(space, probabilities_PK, truth_P=truth_P, top=top)
  if "<svg" not in picture:
    raise ValueError(f"No pole is as probable as {AT_LEAST}, so there is nothing to draw.")
  write_svg(path, picture)


def preference_chart(
  space: PreferenceSpace, probabilities_PK, *, truth_P=None, top: int = 20
) -> str:
  """One user's P̃: a line per dimension, its negative pole to the left, its positive to the right.

  Only the `top` dimensions with the most probable poles are drawn, none below 5 %, under the
  heading of their group, the most certain first. x is in per cent of the width, so text keeps
  its size on a phone.

  Args:
    probabilities_PK: of negative, neutral, positive.
    truth_P: the record's directions, NaN where unknown; each draws a ring at the bar's end
      that a sure and right prediction would reach, in the middle for neutral.
  Returns:
    An SVG and a paragraph.
  Raises:
    ValueError: a shape does not fit the space, a probability is not within 0 to 1, or a label is
      no direction.
  """
  probabilities_PK = np.asarray(probabilities_PK, np.float64)
  size = len(space)
  truth_P = np.full(size, np.nan) if truth_P is None else np.asarray(truth_P, np.float64)
  if probabilities_PK.shape != (size, 3) or truth_P.shape != (size,):
    raise ValueError(
      f"Probabilities {probabilities_PK.shape} and labels {truth_P.shape} for a space of {size} "
      f"dimensions: give [{size}, 3] and [{size}]."
    )
  if not ((probabilities_PK >= 0) & (probabilities_PK <= 1)).all():  # NaN fails too
    raise ValueError("A probability is not within 0 to 1.")
  if not (np.isnan(truth_P) | np.isin(truth_P, DIRECTIONS_K)).all():
    raise ValueError("A label is no direction: give 0, 0.5, 1, or NaN where unknown.")
  certainty_P = probabilities_PK[:, [0, 2]].max(1)
  order = [i for i in np.argsort(-certainty_P, kind="stable") if certainty_P[i] >= AT_LEAST][:top]
  if not order:
    return f"<p>No pole is as probable as {100 * AT_LEAST:.0f} %.</p>"

  groups: dict[str, list[int]] = {}
  for i in order:
    groups.setdefault(space.dimensions[i].group, []).append(i)
  bars, labels, y = [], [], 0
  if not np.isnan(truth_P).all():
    labels.append(
      f'<circle class="ring" cx="6" cy="8" r="5"/><text class="soft" x="18" y="12">{MARK}</text>'
    )
    y = 28
  first = y
  for group, dimensions in groups.items():
    labels.append(f'<text class="head" y="{y + 13}">{_words(group)}</text>')
    y += 22
    for i in dimensions:
      bar, label, y = _dimension(space.dimensions[i], probabilities_PK[i], truth_P[i], y)
      bars.append(bar)
      labels.append(label)
    y += 8
  ticks = [50 + REACH * k / 2 for k in (-2, -1, 0, 1, 2)]
  grid = "".join(
    f'<line class="{"grid" if x != 50 else "axis"}" x1="{x:g}%" x2="{x:g}%" y1="{first}" y2="{y}"/>'
    for x in ticks
  )
  axis = "".join(
    f'<text class="soft middle" x="{x:g}%" y="{y + 16}">{text}</text>'
    for x, text in zip(ticks, ("100 %", "50", "0", "50", "100 %"), strict=True)
  )
  return (
    f'<svg role="img" aria-label="Inferred preferences of one user" height="{y + 22}">'
    f"{grid}{''.join(bars)}{''.join(labels)}{axis}</svg>"
    f'<p class="note">{_note(order, truth_P)}</p>'
  )


def _dimension(dimension, probabilities_K, truth, y):
  """The bars of one dimension, its texts, and where the next one starts."""
  negative, neutral, positive = probabilities_K
  poles = (
    ("negative", negative, _lines(dimension.negative), "0%", "", 50 - REACH * negative),
    ("positive", positive, _lines(dimension.positive), "100%", " end", 50),
  )
  middle = y + LINE * max(len(lines) for _, _, lines, *_ in poles) + 9
  bars, labels = "", ""
  for colour, probability, lines, x, anchor, start in poles:
    bars += (
      f'<rect class="bar {colour}" x="{start:.2f}%" y="{middle - 6}" '
      f'width="{REACH * probability:.2f}%" height="12"/>'
    )
    # The pole that the user leans to stands out.
    tone = "lean" if probability == max(negative, positive) else "soft"
    for k, text in enumerate((_percent(probability), *reversed(lines))):
      at = middle + 4 - (LINE * k + bool(k))  # From the figure beside the bar upwards.
      labels += f'<text class="{tone}{anchor}" x="{x}" y="{at}">{escape(text)}</text>'
  words = (
    f"{dimension.negative}: {_percent(negative)}; neutral: {_percent(neutral)}; "
    f"{dimension.positive}: {_percent(positive)}"
  )
  if not np.isnan(truth):
    at = 50 + 2 * REACH * (truth - NEUTRAL)
    bars += f'<circle class="ring" cx="{at:.2f}%" cy="{middle}" r="5"/>'
    says = {0.0: dimension.negative, 1.0: dimension.positive}.get(truth, "neutral")
    words += f"; {MARK}: {says}"
  return f"<g><title>{escape(words)}</title>{bars}</g>", labels, middle + 14


def preference_table(rows: Sequence[Mapping]) -> str:
  """`format_preference_table` as HTML."""
  return html_table(format_preference_table(rows))


def reliability_diagram(groups: Mapping[str, Sequence[Mapping]]) -> str:
  """Small multiples: predicted probability against observed share, a panel for each group.

  Args:
    groups: group name -> bins, see `calibration.reliability`.
  Returns:
    A grid of panels, each an SVG, and a paragraph.
  """
  largest = max((b["count"] for bins in groups.values() for b in bins), default=0)
  if not largest:
    return f"<p>{EMPTY}</p>"
  panels = "".join(
    f"<div><h3>{_words(group)}</h3>{_reliability_panel(group, bins, largest)}</div>"
    for group, bins in groups.items()
  )
  return (
    f'<div class="panels">{panels}</div><p class="note">Across: the probability given to a pole. '
    "Up: how often the label is that pole. On the dashed line the two agree; below it the model "
    f"is too sure. The area of a dot is its count, the largest {largest}.</p>"
  )


def _reliability_panel(group, bins, largest):
  """The SVG of one group: 360 by 300 units, scaled to its column."""
  left, right, top, bottom = 44, 344, 14, 264
  at_x = lambda share: left + share * (right - left)
  at_y = lambda share: bottom - share * (bottom - top)
  ticks = {0: "0", 0.25: "25", 0.5: "50", 0.75: "75", 1: "100 %"}
  grid = "".join(
    f'<line class="grid" x1="{left}" x2="{right}" y1="{at_y(t):g}" y2="{at_y(t):g}"/>'
    f'<line class="grid" x1="{at_x(t):g}" x2="{at_x(t):g}" y1="{top}" y2="{bottom}"/>'
    f'<text class="soft end" x="{left - 8}" y="{at_y(t) + 4:g}">{text}</text>'
    f'<text class="soft middle" x="{at_x(t):g}" y="{bottom + 20}">{text}</text>'
    for t, text in ticks.items()
  )
  dots = "".join(
    f'<circle class="bubble run0" cx="{at_x(b["predicted"]):.1f}" cy="{at_y(b["observed"]):.1f}" '
    # A lone one is still to be seen.
    f'r="{max(3, 14 * (b["count"] / largest) ** 0.5):.1f}"><title>predicted '
    f"{_percent(b['predicted'])}, observed {_percent(b['observed'])}, {b['count']} times"
    "</title></circle>"
    for b in sorted(bins, key=lambda b: -b["count"])
  )
  return (
    f'<svg role="img" aria-label="Reliability: {_words(group)}" viewBox="0 0 360 292">{grid}'
    f'<line class="mark" x1="{left}" x2="{right}" y1="{bottom}" y2="{top}"/>{dots}</svg>'
  )


def _note(order, truth_P):
  note = "Bars: the probability of each pole; the rest is neutral. "
  stated = np.isin(truth_P, (0, 1))
  if not np.isnan(truth_P).all():
    note += (
      f"Rings: {MARK}, in the middle for neutral; {stated[order].sum()} of the {stated.sum()} "
      "poles it states are among those drawn. "
    )
  return note + f"The {len(order)} most certain of {len(truth_P)} dimensions."


def _lines(pole):
  """A pole's name without its explanation, in one to three short lines."""
  name = pole.split(" (")[0]
  return textwrap.wrap(name, POLE_CHARACTERS, max_lines=3, placeholder=" …") or [name]


def _words(group):
  """A group's name as a heading: big_five is Big five."""
  words = str(group).replace("_", " ")
  return escape(words[:1].upper() + words[1:])


def _percent(share):
  return f"{100 * share:.0f} %"
