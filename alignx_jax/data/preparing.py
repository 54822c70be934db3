"""Published files to a prepared data set: shards, quarantine, data card; made in parts.

Each part of a source file becomes one shard, a function of the part and the settings
alone. A part that is done leaves a receipt, so the same call again after a kill does only
what is missing, and the result is the one of an undisturbed run. What must look at all
records (duplicates) happens at the end, from the receipts; what says that the set is whole
comes last.

    DIR.incomplete/                       DIR/
      plan.json                             alignx-train.array_record-00000-of-00160 …
      receipts/00000.npz …           ──>    dataset_info.json, features.json, index.npz
      alignx-train.array_record-…           data_card.json, quarantine.jsonl

On an object store, where a directory cannot be renamed at once, all is written to DIR
itself, data_card.json last.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import fsspec
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tqdm import tqdm

from alignx_jax.data.alignx import (
  AlignX,
  AlignXConfig,
  content_digest,
  make_features,
  read_records,
  sample_rows,
  to_features,
)
from alignx_jax.data.data_card import LENGTHS, lengths, make_card
from alignx_jax.data.records import RecordError
from alignx_jax.data.sources import Part, Refusal, find_files, find_parts, simulated_parts


@dataclasses.dataclass(frozen=True)
class Job:
  """One part and where it goes.

  Attributes:
    directory: path or URL.
    strict: stop at the first bad record.
    rows: those to take, None for all of them.
    duplicates: those that say what an earlier record says, to leave out and refuse.
  """

  part: Part
  shard: int
  shards: int
  directory: str
  config: AlignXConfig
  strict: bool = False
  rows: frozenset[int] | None = None
  duplicates: frozenset[int] = frozenset()

  def shard_path(self, split: str) -> str:
    number = f"{self.shard:05d}-of-{self.shards:05d}"
    return f"{self.directory}/alignx-{split}.array_record-{number}"

  @property
  def receipt(self) -> str:
    return f"{self.directory}/receipts/{self.shard:05d}.npz"

  @property
  def done(self) -> bool:
    return _exists(self.receipt)


class Receipt:
  """What a job left.

  Attributes:
    refused: the Refusals.
    bytes: of each split.
    source_names: those of its records.
    directions_P4: counts of negative, neutral, positive and unknown directions.
    row, split, source, digest, length: of each record, in the order of the shards of a split;
      split is an index into the config's splits, source one into source_names; digest is
      uint64 [records, 2] and length int64 [records, LENGTHS].
  """

  def __init__(self, job: Job):
    with np.load(io.BytesIO(_read(job.receipt)), allow_pickle=False) as arrays:
      plain = json.loads(arrays["plain"].tobytes())
      self.refused = [Refusal(**refusal) for refusal in plain["refused"]]
      self.bytes = plain["bytes"]
      self.source_names = plain["source_names"]
      for name in ("directions_P4", "row", "split", "source", "digest", "length"):
        setattr(self, name, arrays[name])


# ------------------------------------------------------------------ one part


def run_job(job: Job) -> None:
  """Writes a part's shards and its receipt, each whole or not at all.

  Raises:
    RecordError: the first bad record, if the job is strict.
  """
  config, features = job.config, make_features(job.config.space)
  serializer = ExampleSerializer(features.get_serialized_info())
  P = len(config.space)
  directions_P4 = np.zeros((P, 4), np.int64)
  size, sources = collections.Counter(), {}
  kept, refused = [], []
  with contextlib.ExitStack() as stack:
    writers = {s: stack.enter_context(_shard(job.shard_path(s))) for s in config.splits}
    for item in read_records(job.part, config):
      if job.rows is not None and item.row not in job.rows:
        continue
      if not isinstance(item, Refusal) and item.row in job.duplicates:
        item = Refusal(job.part.file, item.row, "", "says what an earlier record says.")
      if isinstance(item, Refusal):
        if job.strict:
          raise RecordError(f"{item.file}:{item.row}", item.field, item.reason)
        refused.append(dataclasses.asdict(item))
        continue
      stored = to_features(item.example, item.source, config.space)
      proto = serializer.get_tf_example(features.encode_example(stored))
      # Plain serialisation orders a proto's map differently in each process.
      data = proto.SerializeToString(deterministic=True)
      writers[item.split].write(data)
      size[item.split] += len(data)
      directions_P4[np.arange(P), stored["directions"]] += 1
      source = sources.setdefault(item.source, len(sources))
      split = config.splits.index(item.split)
      digest = np.frombuffer(content_digest(item.example), np.uint64)
      kept.append((item.row, split, source, digest, lengths(item.example)))
  row, split, source, digest, length = zip(*kept, strict=True) if kept else [()] * 5
  plain = {"refused": refused, "bytes": size, "source_names": list(sources)}
  with _writing(job.receipt) as path, open(path, "wb") as file:
    np.savez(
      file,
      plain=np.frombuffer(json.dumps(plain).encode(), np.uint8),
      directions_P4=directions_P4,
      row=np.array(row, np.int64),
      split=np.array(split, np.int8),
      source=np.array(source, np.int16),
      digest=np.array(digest, np.uint64).reshape(len(kept), 2),
      length=np.array(length, np.int64).reshape(len(kept), len(LENGTHS)),
    )


@contextlib.contextmanager
def _shard(path: str):
  """Writes an ArrayRecord file that has its name only once it is whole."""
  with _writing(path) as local:
    writer = ArrayRecordWriter(local, "group_size:1")
    try:
      yield writer
    finally:
      writer.close()


# ------------------------------------------------------------------ all parts

RunAll = Callable[[Sequence[Job]], Iterable[Job]]


def prepare(
  files: Sequence[str],
  directory: str | Path,
  config: AlignXConfig,
  *,
  shard_records: int = 8192,
  simulated: Mapping[str, int] | None = None,
  strict: bool = False,
  run_all: RunAll | None = None,
) -> dict:
  """Prepares a data set; the same call again goes on where a killed one was.

  Args:
    files: paths, URLs and patterns; of records that say the same the first in this order
      is kept.
    directory: path or URL; is only read if it holds this set already.
    shard_records: about so many source rows make a shard.
    simulated: {split: users}, instead of files.
    strict: stop at the first bad record.
    run_all: runs jobs in any order and yields each when it is done; by default in as many
      processes as there are cores.
  Returns:
    The data card.
  Raises:
    FileNotFoundError: a pattern matches no file.
    RecordError: a bad record, if strict.
    ValueError: other files or settings made the directory.
  """
  run_all = run_all or functools.partial(run_in_processes, workers=os.cpu_count())
  directory = str(directory)
  work = directory if "://" in directory else directory + ".incomplete"
  whole = _exists(f"{directory}/data_card.json")
  wanted = {
    "settings": config.settings() | {"shard_records": shard_records},
    "files": dict(simulated) if simulated else _fingerprints(files),
  }
  plan = _plan(wanted, directory if whole else work)
  if whole:
    return json.loads(_read(f"{directory}/data_card.json"))
  parts = [Part(**part | {"span": tuple(part["span"])}) for part in plan["parts"]]
  damaged = [Refusal(**refusal) for refusal in plan["damaged"]]
  jobs = [
    Job(part, shard, len(parts), work, config, strict, rows)
    for shard, (part, rows) in enumerate(zip(parts, sample_rows(parts, config), strict=True))
  ]
  waiting = [job for job in jobs if not job.done]
  if strict:
    _raise_first(damaged + [r for job in jobs if job.done for r in Receipt(job).refused])
  total = sum(job.part.rows for job in jobs)
  done = total - sum(job.part.rows for job in waiting)
  with tqdm(total=total, initial=done, desc=config.name, unit="rec", unit_scale=True) as bar:
    for job in run_all(waiting):
      bar.update(job.part.rows)
  for _ in run_all(_with_duplicates(jobs)):
    pass
  card = _finish(jobs, damaged, work, config)
  if work != directory:
    os.replace(work, directory)
  return card


def _raise_first(refused):
  for refusal in refused:
    raise RecordError(f"{refusal.file}:{refusal.row}", refusal.field, refusal.reason)


def run_in_processes(jobs: Sequence[Job], *, workers: int) -> Iterator[Job]:
  """Runs jobs in worker processes; one worker is this process.

  Raises:
    RuntimeError: a worker died.
  """
  if workers <= 1 or len(jobs) <= 1:
    for job in jobs:
      run_job(job)
      yield job
    return
  # Spawned, not forked: a fork inherits locks that other threads hold.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
    futures = {pool.submit(run_job, job): job for job in jobs}
    try:
      for future in concurrent.futures.as_completed(futures):
        if isinstance(error := future.exception(), concurrent.futures.BrokenExecutor):
          raise RuntimeError(
            "A worker died, perhaps for want of memory: set config.workers or "
            "config.shard_records lower and give the same command again; it goes on from here."
          )
        if error is not None:
          raise error
        yield futures[future]
    finally:
      pool.shutdown(cancel_futures=True)


def run_on_beam(jobs: Sequence[Job], *, options: Sequence[str] = ()) -> Sequence[Job]:
  """Runs jobs as an Apache Beam pipeline.

  Args:
    options: of the pipeline, like "--runner=DataflowRunner"; by default it runs here.
  """
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise ImportError("config.engine 'beam' needs: pip install -e '.[beam]'") from error
  if jobs:
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
      _ = pipeline | beam.Create(jobs) | beam.Reshuffle() | beam.Map(run_job)
  return jobs


def _plan(wanted: dict, work: str) -> dict:
  """What to do, as planned before if work has begun.

  Raises:
    ValueError: it was planned for other files or settings.
  """
  path = f"{work}/plan.json"
  if not _exists(path):
    parts, damaged = [], []
    for file in wanted["files"]:
      rows = wanted["settings"]["shard_records"]
      if isinstance(count := wanted["files"][file], int):
        parts += simulated_parts(file, count, rows=rows)
        continue
      found, refused = find_parts(file, rows=rows)
      parts += found
      damaged += refused
    plan = wanted | {
      "parts": [dataclasses.asdict(part) for part in parts],
      "damaged": [dataclasses.asdict(refusal) for refusal in damaged],
    }
    _write(path, plan)
  plan = json.loads(_read(path))
  for name, now in wanted.items():
    changed = [k for k in now | plan[name] if now.get(k) != plan[name].get(k)]
    if changed:
      raise ValueError(
        f"{work} was prepared with other {name} ({', '.join(changed)}); use another --workdir, "
        "or delete it."
      )
  return plan


def _fingerprints(files) -> dict[str, str]:
  """{file: its size and, where the file system tells, its last change}."""
  found = {}
  for file in find_files(files):
    fs, path = fsspec.url_to_fs(file)
    info = fs.info(path)
    changed = info.get("mtime", info.get("etag", info.get("updated", "")))
    found[file] = f"{info['size']} {changed}"
  return found


def _with_duplicates(jobs: Sequence[Job]) -> list[Job]:
  """The jobs with records that say what an earlier one says, told which rows these are."""
  receipts = [Receipt(job) for job in jobs]
  shard = np.repeat(np.arange(len(jobs)), [len(r.row) for r in receipts])
  row = np.concatenate([r.row for r in receipts])
  digest = np.concatenate([r.digest for r in receipts])
  order = np.lexsort((np.arange(len(row)), digest[:, 1], digest[:, 0]))
  again = order[1:][(digest[order][1:] == digest[order][:-1]).all(axis=1)]
  return [
    dataclasses.replace(
      jobs[i], strict=False, duplicates=frozenset(row[again[shard[again] == i]].tolist())
    )
    for i in np.unique(shard[again])
  ]


def _finish(jobs, damaged, work: str, config: AlignXConfig) -> dict:
  """Writes what describes the whole: quarantine, index, TFDS's metadata and the data card."""
  receipts = [Receipt(job) for job in jobs]
  refused = damaged + [refusal for receipt in receipts for refusal in receipt.refused]
  lines = [json.dumps(dataclasses.asdict(refusal)) + "\n" for refusal in refused]
  with _writing(f"{work}/quarantine.jsonl") as path:
    Path(path).write_text("".join(lines), encoding="utf-8")
  names = sorted({name for receipt in receipts for name in receipt.source_names})
  card, index = make_card(receipts, refused, damaged, names, config)
  with _writing(f"{work}/index.npz") as path, open(path, "wb") as file:
    np.savez(file, **index)
  with tempfile.TemporaryDirectory() as local:
    split_infos = [
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[int((receipt.split == i).sum()) for receipt in receipts],
        num_bytes=sum(receipt.bytes.get(split, 0) for receipt in receipts),
        filename_template=tfds.core.ShardedFileTemplate(
          dataset_name="alignx", data_dir=local, filetype_suffix="array_record", split=split
        ),
      )
      for i, split in enumerate(config.splits)
    ]
    builder = AlignX(config=config.name, data_dir=local, file_format="array_record")
    builder.info.set_splits(tfds.core.splits.SplitDict(split_infos))
    builder.info.write_to_directory(local)
    for file in sorted(Path(local).iterdir()):
      with _writing(f"{work}/{file.name}") as path:
        Path(path).write_bytes(file.read_bytes())
  _write(f"{work}/data_card.json", card)
  return card


# ------------------------------------------------------------------ files, here or on a store


def _exists(url: str) -> bool:
  fs, path = fsspec.url_to_fs(url)
  return fs.exists(path)


def _read(url: str) -> bytes:
  fs, path = fsspec.url_to_fs(url)
  return fs.cat_file(path)


def _write(url: str, value) -> None:
  with _writing(url) as path:
    Path(path).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _writing(url: str):
  """A local path to write to, whose content gets its name once all went well."""
  if "://" in url:
    with tempfile.TemporaryDirectory() as directory:
      local = f"{directory}/file"
      yield local
      fs, path = fsspec.url_to_fs(url)
      fs.put_file(local, path)
    return
  partial = url + ".partial"
  os.makedirs(os.path.dirname(url), exist_ok=True)
  yield partial
  os.replace(partial, url)
