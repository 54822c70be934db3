"""What a prepared data set holds: counts, lengths, directions, and what was refused."""

import collections
import hashlib
import re
from collections.abc import Sequence

import numpy as np

from alignx_jax.data.records import Example

# What is measured of each record; texts in characters.
LENGTHS = ("history items", "context", "chosen", "rejected")
PERCENTILES = (5, 25, 50, 75, 95, 99, 100)


def lengths(example: Example) -> tuple[int, ...]:
  """LENGTHS of an example; the context is all that is no response."""
  persona = example.persona
  texts = [
    value
    for item in persona.history
    for field, value in vars(item).items()
    if field != "directions"
  ]
  context = len(example.post) + len(persona.description) + sum(map(len, texts))
  return len(persona.history), context, len(example.chosen), len(example.rejected)


def make_card(receipts: Sequence, refused: Sequence, damaged: Sequence, names, config):
  """The data card of a set, and its index.

  Args:
    receipts: preparing.Receipt of each part.
    refused: every Refusal; of these `damaged` are of what no part holds.
    names: the sources.
    config: the set's AlignXConfig.
  Returns:
    The card, plain values; the index: arrays `source_names`, and `SPLIT_source` [records], the
    source of each record in the order of the split.
  """

  def joined(name, shape=()):
    arrays = [getattr(receipt, name) for receipt in receipts]
    return np.concatenate(arrays) if arrays else np.zeros((0, *shape), np.int64)

  split, length = joined("split"), joined("length", (len(LENGTHS),))
  codes = [
    np.array([names.index(n) for n in r.source_names], np.uint16)[r.source] for r in receipts
  ]
  source = np.concatenate(codes) if codes else np.zeros(0, np.uint16)
  index = {"source_names": np.array(names, np.str_)}
  index |= {f"{s}_source": source[split == i] for i, s in enumerate(config.splits)}
  directions_P4 = sum(r.directions_P4 for r in receipts) + np.zeros((len(config.space), 4), int)
  known = int(directions_P4[:, :3].sum())
  reasons = collections.Counter()
  for refusal in refused:
    # One line for all history items and all numbers.
    reasons[re.sub(r"\d+", "#", f"{refusal.field} {refusal.reason}".strip())] += refusal.rows
  return {
    "name": config.name,
    "records": len(split),
    "refused": sum(refusal.rows for refusal in refused),
    "damaged_files": sorted({refusal.file for refusal in damaged}),
    "refused_by_reason": dict(reasons.most_common()),
    "splits": {s: int((split == i).sum()) for i, s in enumerate(config.splits)},
    "sources": {name: int((source == i).sum()) for i, name in enumerate(names)},
    "published": dict(config.records),
    "neutral_share": float(directions_P4[:, 1].sum() / known) if known else None,
    "dimensions": {
      f"{d.positive} / {d.negative}": dict(zip(("negative", "neutral", "positive"), n, strict=True))
      for d, n in zip(config.space.dimensions, directions_P4[:, :3].tolist(), strict=True)
    },
    "percentiles": {
      name: dict(zip(map(str, PERCENTILES), np.percentile(column, PERCENTILES), strict=True))
      for name, column in zip(LENGTHS, length.T, strict=True)
      if len(column)
    },
    "settings": config.settings(),
    "fingerprint": hashlib.sha256(joined("digest", (2,)).tobytes() + split.tobytes()).hexdigest(),
  }, index


def format_card(card: dict) -> str:
  """The card for people."""

  def section(title, lines):
    width = max((len(name) for name, _ in lines), default=0)
    return [title, *(f"  {name:<{width}}  {value}" for name, value in lines), ""]

  def count(name, value):
    published = card["published"].get(name)
    return f"{value:>11,}" + (f"   (published {published:,})" if published else "")

  lines = section(
    f"{card['name']}: {card['records']:,} records, {card['refused']:,} refused",
    [(name, f"{value:>11,}") for name, value in card["splits"].items()],
  )
  lines += section("Sources", [(name, count(name, n)) for name, n in card["sources"].items()])
  if card["refused_by_reason"]:
    reasons = card["refused_by_reason"].items()
    lines += section("Refused (each in quarantine.jsonl)", [(f"{n:>7,}", r) for r, n in reasons])
  if card["percentiles"]:
    head = [("percentile", "".join(f"{p:>9}" for p in PERCENTILES))]
    lines += section(
      "Lengths (texts in characters)",
      head
      + [
        (name, "".join(f"{values[str(p)]:>9,.0f}" for p in PERCENTILES))
        for name, values in card["percentiles"].items()
      ],
    )
  if card["neutral_share"] is None:
    return "\n".join([*lines, "No record has preference directions."])
  told = sorted(
    ((n["positive"] + n["negative"], name, n) for name, n in card["dimensions"].items()),
    reverse=True,
  )
  rows = [
    (name[:60], f"{n['negative']:>9,}{n['neutral']:>11,}{n['positive']:>9,}") for _, name, n in told
  ]
  share = f"{card['neutral_share']:.1%} of the directions are neutral"
  head = [(share, f"{'negative':>9}{'neutral':>11}{'positive':>9}")]
  return "\n".join(lines + section("Dimensions", head + rows)).rstrip()
