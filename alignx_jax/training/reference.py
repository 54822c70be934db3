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
from tqdm import tqdm

from alignx_jax.data.loader import Loader
from alignx_jax.data.rows import Rows


def score_stream(
  log_probs: Callable[[Rows], jax.Array], loader: Loader, *, describe: str
) -> np.ndarray:
  """Response log-probs of every example of a loader's stream.

  Args:
    log_probs: Rows to [B, N, E] in nats.
    describe: what the progress bar says.
  Returns:
    float32 [stream, N], NaN where the example was refused.
  """
  scores = np.full((loader.stream_length, 2), np.nan, np.float32)

  def store(rows, value_BNE):
    real_BE = rows.example_BE >= 0
    scores[rows.example_BE[real_BE]] = np.asarray(value_BNE).swapaxes(1, 2)[real_BE]

  with tqdm(total=loader.stream_length, desc=describe, unit="ex", mininterval=1.0) as bar:
    pending = None
    for rows in loader.dataset():
      # Dispatch this batch before waiting for the last one.
      dispatched = (rows, log_probs(rows))
      if pending is not None:
        store(*pending)
      pending = dispatched
      bar.update(int((rows.example_BE >= 0).sum()))
    if pending is not None:
      store(*pending)
  return scores


def cached_reference(
  log_probs: Callable[[Rows], jax.Array], loader: Loader, directory: Path, *, weights: str
) -> np.ndarray:
  """score_stream of the training data, read from `directory` if it is there.

  A history policy that shows everything makes every epoch alike: then one is scored.

  Args:
    weights: fingerprint of the reference's weights, see `fingerprint_weights`.
  """
  if loader.formatting.history == "all":
    loader = dataclasses.replace(loader, epochs=1)
  path = directory / f"reference_{cache_key(loader, weights)}.npy"
  if path.exists():
    return np.load(path, allow_pickle=False)
  scores = score_stream(log_probs, loader, describe="reference")
  directory.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile(dir=directory, suffix=".tmp", delete=False) as file:
    np.save(file, scores)
  os.replace(file.name, path)
  return scores


def cache_key(loader: Loader, weights: str) -> str:
  """Hash of all that a stream's log-probs depend on."""
  digest = hashlib.sha256()
  formatting = loader.formatting
  for example in loader.examples:
    digest.update(repr(_plain(example)).encode())
  settings = (
    loader.seed,
    loader.epochs,
    formatting.tokenizer.fingerprint,
    formatting.space,
    formatting.regions,
    formatting.chat,
    formatting.prompt,
    formatting.condition,
    formatting.history,
    weights,
  )
  digest.update(repr(settings).encode())
  return digest.hexdigest()[:32]


def _plain(value):
  """Nested plain values of a dataclass, arrays as lists, so that repr shows all of it."""
  if dataclasses.is_dataclass(value):
    return [_plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
  if isinstance(value, tuple):
    return [_plain(item) for item in value]
  return value.tolist() if isinstance(value, np.ndarray) else value


def fingerprint_weights(params) -> str:
  """Hash of every parameter's bytes."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()
