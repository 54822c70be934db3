"""The frozen reference of the DPO loss: log-probs computed once, kept on disk.

The file's name is a hash of everything that the numbers depend on, so every run of a
sweep that shares them shares the file, and none can take another's.
"""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from alignx_jax.data.loader import Loader
from alignx_jax.data.prepared import PreparedExamples
from alignx_jax.data.rows import Rows
from alignx_jax.models.decoder import Decoder
from alignx_jax.personas.prompts import chat_format, prompt_format


def score_stream(
  log_probs: Callable[[Rows], jax.Array], loader: Loader, *, describe: str
) -> np.ndarray:
  """Response log-probs of every example of a loader's stream.

  Args:
    log_probs: Rows to [B, N, E] in nats.
    describe: what the progress bar says.
  Returns:
    float32 [slots, N], NaN where the example was refused.
  """
  scores = np.full((loader.stream.slots, 2), np.nan, np.float32)

  def store(rows, value_BNE):
    real_BE = rows.example_BE >= 0
    scores[rows.example_BE[real_BE]] = np.asarray(value_BNE).swapaxes(1, 2)[real_BE]

  with tqdm(total=loader.stream_length, desc=describe, unit="ex", mininterval=1.0) as bar:
    pending = None
    for rows, _ in loader.batches():
      # Dispatch this batch before waiting for the last one.
      dispatched = (rows, log_probs(rows))
      if pending is not None:
        store(*pending)
      pending = dispatched
      bar.update(int((rows.example_BE >= 0).sum()))
    if pending is not None:
      store(*pending)
  loader.report_counts(describe)
  return scores


def cached_reference(
  log_probs: Callable[[Rows], jax.Array], loader: Loader, directory: Path, *, model: Decoder
) -> np.ndarray:
  """score_stream of the training data, read from `directory` if it is there.

  Where nothing is drawn every epoch is alike: then one is scored.

  Args:
    model: the reference, whose `log_probs` these are.
  """
  if not loader.formatting.history.random:
    loader = dataclasses.replace(loader, epochs=1, seed=None, mixture=None)
  path = directory / f"reference_{cache_key(loader, model)}.npy"
  if path.exists():
    return np.load(path, allow_pickle=False)
  scores = score_stream(log_probs, loader, describe="reference")
  directory.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile(dir=directory, suffix=".tmp", delete=False) as file:
    np.save(file, scores)
  os.replace(file.name, path)
  return scores


def counted_steps(loader: Loader, directory: Path, *, model: Decoder) -> int:
  """Batches in a loader's stream, counted once and then read from `directory`."""
  path = directory / f"steps_{cache_key(loader, model)}_{loader.rows}_{loader.window}.txt"
  if not path.exists():
    with tqdm(total=loader.stream_length, desc="counting steps", unit="ex", mininterval=1.0) as bar:
      steps = 0
      for rows, _ in loader.batches():
        steps += 1
        bar.update(int((rows.example_BE >= 0).sum()))
    loader.report_counts("training")
    directory.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(f"{steps}\n", encoding="utf-8")
    os.replace(partial, path)
  return int(path.read_text(encoding="utf-8"))


def cache_key(loader: Loader, model: Decoder) -> str:
  """Hash of all that a stream's log-probs depend on: data, formatting, seed and model."""
  formatting = loader.formatting
  settings = (
    loader.seed,
    loader.epochs,
    loader.mixture and loader.mixture[1],
    formatting.tokenizer.fingerprint,
    formatting.space,
    formatting.regions,
    chat_format(formatting.chat),
    prompt_format(formatting.prompt),
    formatting.condition,
    formatting.history,
    model.arch,
    model.compute_dtype.name,
  )
  digest = hashlib.sha256(repr(settings).encode())
  if isinstance(loader.examples, PreparedExamples):
    digest.update(loader.examples.fingerprint.encode())
  else:
    for example in loader.examples:
      digest.update(repr(_plain(example)).encode())
  for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model)):
    digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()[:32]


def _plain(value):
  """Nested plain values of a dataclass, arrays as lists, so that repr shows all of it."""
  if dataclasses.is_dataclass(value):
    return [_plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
  if isinstance(value, tuple):
    return [_plain(item) for item in value]
  return value.tolist() if isinstance(value, np.ndarray) else value
