"""What an evaluation measured, pair by pair: one parquet file a benchmark.

A row is one test pair under one policy, condition and protocol. It says how the pair was scored or
why it was not, and nothing that users wrote: users and posts are digests.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alignx_jax.data.formatting import Formatting
from alignx_jax.data.records import Example
from alignx_jax.evaluation.accuracy import Comparison, bootstrap_interval
from alignx_jax.files import as_path
from alignx_jax.personas.persona import Persona
from alignx_jax.personas.prompts import render_response

ROW = ("benchmark", "policy", "condition", "protocol")  # what a figure in a table is of
_TEXT = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
  [
    ("benchmark", _TEXT),
    ("policy", _TEXT),
    ("condition", _TEXT),
    ("protocol", _TEXT),
    ("id", pa.string()),  # of the record, "file:index"
    ("user", pa.string()),  # the same for the same persona
    ("post", pa.string()),
    # Summed log-probs of the responses in nats, null where the pair could not be scored.
    ("policy_chosen", pa.float32()),
    ("policy_rejected", pa.float32()),
    ("reference_chosen", pa.float32()),
    ("reference_rejected", pa.float32()),
    ("margin", pa.float32()),  # of log π/π_ref, chosen − rejected
    # 1 or 0; ½ for responses of one length in the length control; null where not scored.
    ("correct", pa.float32()),
    ("unscored", _TEXT),  # why; null where scored
    ("chosen_tokens", pa.int32()),
    ("rejected_tokens", pa.int32()),
    ("chosen_characters", pa.int32()),
    ("rejected_characters", pa.int32()),
  ]
)
SCORES = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


def user_of(persona: Persona) -> str:
  """Stands for who has this persona: the same acts in any order, and the same description.

  Published records name no user.
  """
  acts = sorted(
    _digest([value for field, value in vars(act).items() if field != "directions"])
    for act in persona.history
  )
  return _digest([acts, persona.description])


def make_table(
  benchmark: str,
  examples: Sequence[Example],
  formatting: Formatting,
  comparisons: Iterable[Comparison],
) -> pa.Table:
  """Rows of SCHEMA: the length control, then each comparison's, in the order of the examples.

  Args:
    formatting: its tokenizer and formats say how long responses are.
  """
  fixed = _fixed(examples, formatting)
  longer_X = np.sign(fixed["chosen_characters"] - fixed["rejected_characters"])
  labels = {"policy": "length", "condition": "length", "protocol": "none"}
  tables = [_table(benchmark, labels, fixed, {"correct": (longer_X + 1) / 2})]
  for one in comparisons:
    labels = {"policy": one.policy, "condition": one.condition, "protocol": one.protocol}
    scores_X4 = np.concatenate([one.score_XN, one.reference_XN], axis=1)
    ratio_XN = one.score_XN - one.reference_XN
    margin_X = ratio_XN[:, 0] - ratio_XN[:, 1]
    known_X = np.isfinite(margin_X)
    reasons = {} if known_X.all() else one.unscored()
    columns = {name: np.where(known_X, scores_X4[:, i], np.nan) for i, name in enumerate(SCORES)}
    columns |= {"margin": margin_X, "correct": np.where(known_X, margin_X > 0, np.nan)}
    usual = "its log-prob is not finite"
    unscored = [None if ok else reasons.get(i, usual) for i, ok in enumerate(known_X)]
    tables.append(_table(benchmark, labels, fixed, columns, unscored))
  return pa.concat_tables(tables)


def _fixed(examples, formatting) -> dict[str, np.ndarray]:
  """What does not depend on the policy."""
  names = {"chat": formatting.chat, "prompt": formatting.prompt}
  encode = formatting.tokenizer.encode_pieces
  columns = {
    "id": [example.id for example in examples],
    "user": [user_of(example.persona) for example in examples],
    "post": [_digest(example.post) for example in examples],
  }
  for branch in ("chosen", "rejected"):
    texts = [getattr(example, branch) for example in examples]
    lengths = [len(encode(render_response(text, **names))) for text in texts]
    columns[f"{branch}_tokens"] = np.array(lengths, np.int32)
    columns[f"{branch}_characters"] = np.array([len(text) for text in texts], np.int32)
  return columns


def _table(benchmark, labels, fixed, columns, unscored=None) -> pa.Table:
  size = len(fixed["id"])

  def column(field):
    if field.name in labels or field.name == "benchmark":
      return pa.array([labels.get(field.name, benchmark)] * size, field.type)
    if field.name in fixed:
      return pa.array(fixed[field.name], field.type)
    if field.name == "unscored":
      return pa.array(unscored or [None] * size, pa.string()).cast(field.type)
    if field.name not in columns:
      return pa.nulls(size, field.type)
    values = np.asarray(columns[field.name], np.float32)
    return pa.array(values, field.type, mask=~np.isfinite(values))

  return pa.table([column(field) for field in SCHEMA], schema=SCHEMA)


def summarise(table: pa.Table) -> list[dict]:
  """Rows of results.json, each with its benchmark; one without a scored pair is left out."""
  return [
    {
      **labels,
      "accuracy": float(columns["correct"][known_X].mean()),
      **dict(
        zip(
          ("low", "high"),
          bootstrap_interval(columns["correct"][known_X], columns["post"][known_X]),
          strict=True,
        )
      ),
      "examples": int(known_X.sum()),
      "posts": len(set(columns["post"][known_X])),
      "users": len(set(columns["user"][known_X])),
      "refused": int((~known_X).sum()),
    }
    for labels, columns in row_groups(table)
    if (known_X := np.isfinite(columns["correct"])).any()
  ]


def unscored_counts(table: pa.Table) -> list[dict]:
  """Of each row of a table, how many pairs were not scored for which reason; ROW, reason, count."""
  found = []
  for labels, columns in row_groups(table):
    reasons, counts = np.unique(columns["unscored"][columns["unscored"] != ""], return_counts=True)
    found += [
      labels | {"reason": str(reason), "count": int(count)}
      for reason, count in zip(reasons, counts, strict=True)
    ]
  return found


def row_groups(table: pa.Table) -> list[tuple[dict, dict[str, np.ndarray]]]:
  """The pairs of each figure: its ROW, and columns as arrays; null is NaN or ""."""
  names = ("id", "user", "post", "correct", "margin", "unscored")
  columns = {}
  for name in names:
    column = table[name]
    missing = float("nan") if pa.types.is_floating(column.type) else ""
    text = missing == ""
    values = [missing if v is None else v for v in column.to_pylist()]
    columns[name] = np.array(values, object if text else np.float64)
  labels = list(zip(*(table[name].to_pylist() for name in ROW), strict=True))
  places = {}
  for i, label in enumerate(labels):
    places.setdefault(label, []).append(i)
  return [
    (dict(zip(ROW, label, strict=True)), {name: values[at] for name, values in columns.items()})
    for label, at in places.items()
  ]


def write_table(path, table: pa.Table, about: Mapping[str, object]) -> None:
  """Writes the table whole or not at all.

  Args:
    about: plain values that are kept with it.
  """
  path = as_path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.tmp")
  table = table.replace_schema_metadata({"alignx_jax": json.dumps(dict(about))})
  with partial.open("wb") as file:
    pq.write_table(table, file)
  partial.replace(path)


def read_table(path) -> tuple[pa.Table, dict]:
  """A table and what is kept with it.

  Raises:
    FileNotFoundError, ValueError: it is not there or no such table; says which file.
  """
  path = as_path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; python -m alignx_jax.evaluate writes it.")
  try:
    with path.open("rb") as file:
      table = pq.read_table(file)
    about = json.loads((table.schema.metadata or {})[b"alignx_jax"])
    return table.select(SCHEMA.names).cast(SCHEMA), about
  except (pa.ArrowException, KeyError, ValueError, OSError) as error:
    raise ValueError(
      f"{path} is no table of an evaluation, or damaged ({error}); delete it and evaluate again."
    ) from error


def _digest(value) -> str:
  """16 characters that stand for plain values."""
  return hashlib.blake2b(repr(value).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
