"""What an evaluation measured: rows of results.json, and as a table.

A result is a dict: "policy", "condition", "protocol" (strings, see LEGEND), "accuracy" with
its 95 % bootstrap interval "low" to "high" (shares, 0 to 1), and "examples", how many pairs
were scored. Other keys are kept and ignored.
"""

import json

from alignx_jax.files import write_text

LEGEND = {
  "policy": {
    "base": "the model before alignment; where it reads a persona, few-shot prompting",
    "start": "the aligned model that a run began from (config.bridge.start), here the reference",
    "ica": "in-context alignment: trained to read the raw persona P",
    "pba": "preference-bridged alignment by label averaging: trained to read P̃, the user's "
    "preference directions, as the labels of the history average to, as text",
    "pba_head": "the same through a learned bridge: P̃ inferred from behaviour, told as tokens",
    "pba_by_head": "pba that was trained on P̃ as text that a learned head inferred",
    "dpo": "universal DPO: trained without personas, one policy for all users",
    "vpl": "variational preference learning: a latent user variable z, inferred from the user's "
    "pairs, moves soft tokens of the prompt",
    "length": "a control, no model",
  },
  "condition": {
    "persona": "the raw persona is read",
    "pairs": "of the raw persona the compared pairs alone",
    "inferred": "P̃ inferred: by pba averaged from the labels of the history, by pba_head without "
    "any; by vpl the mean of z",
    "profile": "P̃ as text that the learned head inferred, or as the record has it",
    "golden": "P̃ from the record's label, the ceiling",
    "shuffled": "another user's persona, P̃ or z, the floor",
    "none": "no persona; of vpl z = 0",
    "N acts": "the policy's first condition, where it knows N acts of the user",
    "N comments": "the same, of comments alone",
    "N pairs": "the same, of compared pairs alone",
    "reversed": "P̃ with every direction turned; low, where the policy does what P̃ says",
    "golden reversed": "the same of golden P̃",
    "exchanged": "as if the user had preferred the other response of each pair of the history",
    "pairs exchanged": "the same, and of the user nothing is known but these pairs",
    "strength S": "one dimension of the pair steered towards the user's pole (+) or the other (−)",
    "another reversed": "turned is the dimension that P̃ is surest of and the pair is not of",
    "aligned + N": "aligned without the held-out dimensions, then trained on N examples of them",
    "base + N": "the base, trained on N examples of the held-out dimensions and no others",
    "length": "the longer response wins, no model",
  },
  "protocol": {
    "matched": "reference scored on the same prompt (of pba_head and vpl, without what they infer)",
    "release": "reference scored on the raw-persona prompt, as the AlignX release does",
    "unconditioned": "the reference is the untrained base without any persona",
  },
}
COLUMNS = ("policy", "condition", "protocol", "accuracy % [95 % CI]", "pairs")
EMPTY = "nothing measured"


def format_table(results, *, extra=None) -> str:
  """The results, in the order given, as a Markdown table that also reads well in a terminal.

  Args:
    extra: further columns, key in a result to heading.
  Raises:
    ValueError: a result lacks a key, or a share is not within 0 to 1.
  """
  check(results)
  if not results:
    return EMPTY
  extra = extra or {}
  rows = [
    (
      *(r[key] for key in COLUMNS[:3]),
      f"{percent(r)} {interval(r)}",
      r["examples"],
      *(r[key] for key in extra),
    )
    for r in results
  ]
  return markdown((*COLUMNS, *extra.values()), rows, left=3)


def markdown(columns, rows, *, left: int) -> str:
  """A Markdown table that also reads well in a terminal; so many columns are of words."""
  plain = lambda text: " ".join(str(text).split()).replace("|", "\\|")
  rows = [tuple(map(plain, row)) for row in rows]
  widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
  line = lambda cells: "| " + " | ".join(cells) + " |"
  fit = lambda row: [
    cell.ljust(width) if i < left else cell.rjust(width)
    for i, (cell, width) in enumerate(zip(row, widths, strict=True))
  ]
  rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
  return "\n".join(line(cells) for cells in (fit(columns), rule, *map(fit, rows)))


def format_policies(results) -> str:
  """A line for each policy of the results: what it is."""
  policies = dict.fromkeys(r["policy"] for r in results)
  return "\n".join(f"{name}: {LEGEND['policy'].get(name, '')}" for name in policies)


def write_results(path, results) -> None:
  """Writes the results, every key of them, as a JSON list; atomically.

  Raises:
    ValueError: a number is NaN or infinite, which JSON cannot hold.
  """
  number = lambda value: value.item()  # NumPy and JAX scalars
  write_text(path, json.dumps(list(results), indent=1, allow_nan=False, default=number) + "\n")


def check(results):
  """Raises ValueError on the first result that cannot be shown truthfully."""
  for i, result in enumerate(results):
    for key in ("policy", "condition", "protocol", "accuracy", "low", "high", "examples"):
      if key not in result:
        raise ValueError(f"results[{i}] has no {key!r}: it has {sorted(result)}")
    for key in ("accuracy", "low", "high"):
      if not 0 <= result[key] <= 1:  # NaN fails too
        raise ValueError(f"results[{i}][{key!r}] is {result[key]}: give a share, from 0 to 1")


def percent(result):
  return f"{100 * result['accuracy']:.1f}"


def interval(result):
  return f"[{100 * result['low']:.1f}, {100 * result['high']:.1f}]"
