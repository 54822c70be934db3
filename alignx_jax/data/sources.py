"""Published files, parquet and JSON lists: in parts that can be read apart, record by record.

A file is never read whole, and a bad record costs no other one: where a part is damaged,
what is damaged comes out as a `Refusal` that names file, row, field and reason, and reading
goes on behind it.
"""

import dataclasses
import io
import json
import re
from collections.abc import Iterator, Sequence

import fsspec
import pyarrow.parquet as pq
from tqdm import tqdm

from alignx_jax.personas.simulator import TALKATIVE, simulate_record

SIMULATED = "simulated:"  # and a split: the "file" of simulated users
_BLOCK = 1 << 23  # bytes read at once
# Whole strings, brackets, and the start of a string that the block cuts off.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[][{}]|"', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Part:
  """Consecutive records of one file.

  Attributes:
    file: path or URL.
    row: index in the file of the first record.
    rows: how many.
    span: where they are: bytes [start, end) of a JSON list, row groups [start, end) of a
      parquet file.
  """

  file: str
  row: int
  rows: int
  span: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Refusal:
  """Records that cannot be used: `rows` of them from `row` on."""

  file: str
  row: int
  field: str
  reason: str
  rows: int = 1


def find_files(patterns: Sequence[str]) -> list[str]:
  """Files of paths, URLs (gs://, hf://, …) and patterns with *, in the order given.

  Raises:
    FileNotFoundError: nothing matches a pattern.
    ImportError: the package that a URL needs is not installed; names it.
  """
  files = []
  for pattern in patterns:
    fs, path = fsspec.url_to_fs(pattern)
    found = sorted(fs.glob(path)) if "*" in path else [path] * fs.isfile(path)
    if not found:
      raise FileNotFoundError(f"{pattern} matches no file; set config.files.")
    protocol = pattern.split("://")[0] + "://" if "://" in pattern else ""
    files += [protocol + name.removeprefix(protocol) for name in found]
  return files


def find_parts(file: str, *, rows: int) -> tuple[list[Part], list[Refusal]]:
  """Cuts a file into parts of about so many records.

  Returns:
    The parts, and what is damaged so that no part holds it.
  """
  return (_parquet_parts if file.endswith(".parquet") else _json_parts)(file, rows)


def simulated_parts(split: str, count: int, *, rows: int) -> list[Part]:
  """Parts of the first `count` simulated users of a split."""
  starts = range(0, count, rows)
  sizes = [min(rows, count - start) for start in starts]
  return [
    Part(f"{SIMULATED}{split}", start, size, (start, start + size))
    for start, size in zip(starts, sizes, strict=True)
  ]


def read_part(part: Part, *, seed: int = 0) -> Iterator[tuple[int, dict] | Refusal]:
  """(row, record) of each record that can be read, a Refusal for each that cannot.

  Args:
    seed: of simulated users.
  """
  if part.file.startswith(SIMULATED):
    split = part.file.removeprefix(SIMULATED)
    return (
      (i, simulate_record(i, split=split, seed=seed, config=TALKATIVE)) for i in range(*part.span)
    )
  return (_read_parquet if part.file.endswith(".parquet") else _read_json)(part)


# ------------------------------------------------------------------ JSON lists


def _json_parts(file, rows):
  parts, refusals, count, first, begin = [], [], 0, 0, 0
  with fsspec.open(file, "rb") as stream:
    size = stream.seek(0, 2)
    stream.seek(0)
    with tqdm(total=size, desc=f"scanning {file}", unit="B", unit_scale=True) as bar:
      end = 0
      for element in elements(stream):
        if isinstance(element, str):
          refusals.append(Refusal(file, count, "", element))
          break
        bar.update(element[1] - bar.n)
        if count == first:
          begin = element[0]
        count, end = count + 1, element[1]
        if count - first == rows:
          parts.append(Part(file, first, rows, (begin, end)))
          first = count
      if count > first:
        parts.append(Part(file, first, count - first, (begin, end)))
      bar.update(size - bar.n)
  return parts, refusals


def elements(stream, *, inside: bool = False) -> Iterator[tuple[int, int] | str]:
  """Bytes [start, end) of each element of a JSON list, without parsing them.

  Args:
    stream: a binary file at its start.
    inside: the stream holds elements and the commas between them, without the brackets.
  Yields:
    Spans; at last, if the list is not whole, a sentence that says so.
  """
  depth = 1 if inside else 0
  buffer, offset = b"", 0  # offset: of the buffer in the stream
  gap = start = 0  # where the text between two containers began, where the container did
  at = 0  # position in the buffer up to which tokens were read
  while True:
    block = stream.read(_BLOCK)
    buffer += block
    for token in _TOKEN.finditer(buffer, at):
      kind = token[0]
      if kind == b'"':  # cut off: read it again with the next block
        at = token.start()
        break
      at = token.end()
      if kind in b"[{":
        depth += 1
        if depth == 1:
          if kind == b"{" or buffer[: token.start()].strip():
            yield "is not a JSON list of records."
            return
          gap = offset + token.end()
        elif depth == 2:
          start = offset + token.start()
          yield from _scalars(buffer[gap - offset : token.start()], gap)
      elif kind in b"]}":
        depth -= 1
        if depth == 1:
          yield start, offset + token.end()
          gap = offset + token.end()
        elif depth == 0:
          yield from _scalars(buffer[gap - offset : token.start()], gap)
          return
    else:
      at = max(at, len(buffer))
    if not block:
      break
    # Keep what the element or gap under way needs.
    keep = (gap if depth <= 1 else start) - offset
    buffer, offset, at = buffer[keep:], offset + keep, at - keep
  if inside and depth == 1:
    yield from _scalars(buffer[gap - offset :], gap)
  elif depth > 1:
    yield f"ends inside a record, at byte {offset + len(buffer)}: fetch the file again."
  else:
    yield "ends before its list does: fetch the file again."


def _scalars(text, offset):
  """Spans of elements that are neither objects nor lists, in the text between those."""
  for match in re.finditer(rb'(?:"[^"\\]*(?:\\.[^"\\]*)*"|[^,"])+', text, re.DOTALL):
    if match[0].strip():
      yield offset + match.start(), offset + match.end()


def _read_json(part):
  start, end = part.span
  with fsspec.open(part.file, "rb") as stream:
    stream.seek(start)
    data = stream.read(end - start)
  for row, (first, last) in enumerate(elements(io.BytesIO(data), inside=True), start=part.row):
    try:
      # A byte that is no UTF-8 becomes a character that validation refuses, by field.
      yield row, json.loads(data[first:last].decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
      yield Refusal(part.file, row, "", f"is not JSON ({error}).")


# ------------------------------------------------------------------ parquet


def _parquet_parts(file, rows):
  try:
    with fsspec.open(file, "rb") as stream:
      metadata = pq.ParquetFile(stream).metadata
      sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
  except (OSError, ValueError) as error:  # pyarrow's errors are of these
    return [], [Refusal(file, 0, "", f"is not parquet that can be read ({error}).")]
  parts, first, count, row = [], 0, 0, 0
  for group, size in enumerate(sizes):
    count += size
    if count >= rows or group + 1 == len(sizes):
      parts.append(Part(file, row, count, (first, group + 1)))
      first, row, count = group + 1, row + count, 0
  return parts, []


def _read_parquet(part):
  with fsspec.open(part.file, "rb") as stream:
    file = pq.ParquetFile(stream)
    row = part.row
    for group in range(*part.span):
      end = row + file.metadata.row_group(group).num_rows
      try:
        for batch in file.iter_batches(batch_size=256, row_groups=[group]):
          for i in range(batch.num_rows):
            try:
              yield row, batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
              yield Refusal(part.file, row, *_undecodable(batch.slice(i, 1), error))
            row += 1
      except (OSError, ValueError) as error:
        reason = f"row group {group} cannot be read ({error})."
        yield Refusal(part.file, row, "", reason, rows=end - row)
        row = end


def _undecodable(batch, error):
  """Field and reason of text in a one-row batch that is no UTF-8."""
  for name, column in zip(batch.schema.names, batch.columns, strict=True):
    try:
      column.to_pylist()
    except UnicodeDecodeError:
      return name, f"is not valid UTF-8 ({error.reason}); mend it."
  return "", str(error)
