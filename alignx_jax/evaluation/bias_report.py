"""A bias audit for people: tables in Markdown and HTML, a picture, and what the words mean.

The audit is a dict, as experiments/audit.py makes it and bias.json holds it.
"""

from collections.abc import Mapping, Sequence
from html import escape

from alignx_jax.evaluation.bias import LEAST_PAIRS, LEAST_POSTS
from alignx_jax.evaluation.pictures import accuracy_bars

TOO_FEW = "too few to say"
HEADINGS = {
  "groups": "By group",
  "gaps": "Gaps between groups",
  "counterfactual": "Another age or gender stated, all else equal",
  "leakage": "A withheld age or gender, predicted from P̃",
}
LEGEND = (
  "Intervals are 95 %, by bootstrap over posts (of leakage over users). A group with fewer than "
  f"{LEAST_PAIRS} pairs, or of fewer than {LEAST_POSTS} posts, says nothing.",
  "margin: β times the log-ratio of chosen less that of rejected, nats. overconfidence: the mean "
  "probability that the policy gives to what it prefers, less how often it is right. ECE: "
  "calibration error of that probability; behind it what chance alone makes of it.",
  "Age and gender are what descriptions state in so many words (under 30, 30 to 59, 60 and over); "
  "nothing is guessed. Holders of a dimension are those whose record's label is that pole.",
  "change and size of change are of the margin; flips, how often the other response is preferred "
  "then; P̃ varies by the total variation of a dimension, mean over dimensions.",
  "Leakage is from P̃ inferred without the description, or from the record's label (golden), by a "
  "logistic regression on other users. AUC: 50 % by chance. gain: accuracy over the majority's.",
)


def format_audit(found: Mapping) -> str:
  """All tables as Markdown, with what is to be known of them."""
  parts = [_heading(found)]
  for name, heading in HEADINGS.items():
    columns, rows = table(found, name)
    body = _markdown(columns, rows) if rows else _nothing(found, name)
    parts.append(f"{heading}:\n\n{body}")
  return "\n\n".join([*parts, *remarks(found)])


def pictures(found: Mapping) -> list[tuple[str, str]]:
  """(heading, HTML) pairs for evaluation/report.py."""
  drawn = [
    {
      "policy": row["attribute"],
      "condition": row["group"],
      "protocol": f"{row['examples']} pairs",
      "examples": row["examples"],
      "accuracy": row["accuracy"],
      "low": row["accuracy_low"],
      "high": row["accuracy_high"],
    }
    for row in found["groups"]
    if row["enough"]
  ]
  parts = [("Alignment accuracy by group", accuracy_bars(drawn))]
  for name, heading in HEADINGS.items():
    columns, rows = table(found, name)
    body = _html(columns, rows) if rows else f"<p>{escape(_nothing(found, name))}</p>"
    parts.append((heading, body))
  return parts


def table(found: Mapping, name: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
  """Columns and cells of one of HEADINGS."""
  if name == "groups":
    columns = ("of", "group", "pairs", "posts", "accuracy %", "margin", "overconfidence %", "ECE %")
    return columns, [
      (
        *(row["attribute"], row["group"], str(row["examples"]), str(row["posts"])),
        _figure(row, "accuracy", 100) if row["enough"] else TOO_FEW,
        *(_figure(row, key, scale) for key, scale in (("margin", 1), ("overconfidence", 100))),
        "–" if row["ece"] is None else f"{100 * row['ece']:.1f} ({100 * row['ece_chance']:.1f})",
      )
      for row in found["groups"]
    ]
  if name == "gaps":
    columns = ("of", "between", "accuracy, points", "margin, nats", "overconfidence, points")
    keys = (("accuracy", 100), ("margin", 1), ("overconfidence", 100))
    return columns, [
      (
        *(row["attribute"], " − ".join(row["groups"])),
        *(_figure(row, key, scale) for key, scale in keys),
      )
      for row in found["gaps"]
      if row["enough"]
    ]
  if name == "counterfactual":
    columns = ("stated", "instead", "pairs", "change", "size of change", "flips %", "P̃ varies %")
    keys = (("change", 1), ("absolute", 1), ("flips", 100), ("variation", 100))
    return columns, [
      (
        *(row["before"], row["after"], str(row["examples"])),
        *(_figure(row, key, scale) if row["enough"] else TOO_FEW for key, scale in keys[:1]),
        *(_figure(row, key, scale) for key, scale in keys[1:]),
      )
      for row in found["counterfactual"]
    ]
  columns = ("predicted", "from", "users", "AUC %", "accuracy %", "majority %", "gain, points")
  return columns, [
    (
      *(row["attribute"], row["predictor"], " + ".join(map(str, row["groups"].values())) or "0"),
      _figure(row, "auc", 100) if row["enough"] else TOO_FEW,
      _figure(row, "accuracy", 100),
      "–" if row["majority"] is None else f"{100 * row['majority']:.1f}",
      _figure(row, "gain", 100),
    )
    for row in found["leakage"]
  ]


def remarks(found: Mapping) -> list[str]:
  """What the tables leave out, and what to beware of."""
  told = []
  for attribute, row in found["smallest"].items():
    told.append(f"The smallest group by {attribute} is {row['group']}: {row['examples']} pairs.")
  small = [row for row in found["gaps"] if not row["enough"]]
  if small:
    named = ", ".join(f"{row['attribute']} ({' − '.join(row['groups'])})" for row in small)
    told.append(f"Not shown, of groups too small to say anything: {named}.")
  if found["dimensions_too_small"]:
    told.append(
      f"Of {found['dimensions']} dimensions {found['dimensions_too_small']} have too few holders "
      "of a pole to say anything; --dimension=POLE shows one of them nevertheless."
    )
  intervals = [
    (row[f"{key}_low"], row[f"{key}_high"])
    for row in found["gaps"]
    for key in ("accuracy", "margin", "overconfidence")
    if row[key] is not None
  ]
  if intervals:
    away = sum(not low <= 0 <= high for low, high in intervals)
    told.append(
      f"{away} of {len(intervals)} intervals of gaps leave out 0; where there are no gaps, about "
      f"{0.05 * len(intervals):.0f} would."
    )
  if pronouns := sum(row["pronouns"] for row in found["counterfactual"]):
    told.append(f"{pronouns} swapped descriptions keep pronouns that contradict them.")
  for row in found["counterfactual"]:
    if most := [d for d in row.get("dimensions", ()) if d["variation"] >= 0.005]:
      named = ", ".join(f"{d['dimension']} {_figure(d, 'variation', 100)} %" for d in most)
      told.append(f"{row['before']} to {row['after']}, P̃ varies most on: {named}.")
  if found["note"]:
    told.append(found["note"])
  return told


def _heading(found) -> str:
  low, high = found["low"], found["high"]
  return (
    f"{found['policy']} of {found['workdir']}: {100 * found['accuracy']:.1f} "
    f"[{100 * low:.1f}, {100 * high:.1f}] % of {found['examples']} pairs, "
    f"{found['refused']} could not be scored."
  )


def _nothing(found, name) -> str:
  if name == "gaps" and found["gaps"]:
    return "No two groups are large enough."
  if name == "counterfactual":
    return found["note"] or "No description states an age or a gender."
  return "Nothing to show."


def _figure(row, key, scale) -> str:
  if row.get(key) is None:
    return "–"
  digits = 1 if scale == 100 else 3
  value, low, high = (f"{scale * row[k]:.{digits}f}" for k in (key, f"{key}_low", f"{key}_high"))
  return f"{value} [{low}, {high}]"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
  fit = lambda row: [
    cell.ljust(width) if i < 2 else cell.rjust(width)
    for i, (cell, width) in enumerate(zip(row, widths, strict=True))
  ]
  rule = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
  return "\n".join("| " + " | ".join(row) + " |" for row in (fit(columns), rule, *map(fit, cells)))


def _html(columns, rows) -> str:
  kind = lambda i: " class=number" if i > 1 else ""
  head = "".join(f"<th{kind(i)}>{escape(cell)}</th>" for i, cell in enumerate(columns))
  body = "".join(
    "<tr>" + "".join(f"<td{kind(i)}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
    for row in rows
  )
  table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
  return f'<div class="scroll">{table}</div>'
