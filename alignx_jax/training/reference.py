"""The frozen reference of the DPO loss: log-probs computed once, kept on disk.

The file's name is a hash of everything that the numbers depend on, so every run of a
sweep that shares them shares the file, and none can take another's.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from alignx_jax.data.loader import PACKING, Loader
from alignx_jax.data.rows import Rows
from alignx_jax.models.bridge import BridgeParam
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.lora import LoraParam
from alignx_jax.personas.prompts import chat_format, prompt_format
from alignx_jax.training import hosts
from alignx_jax.training import mesh as meshes
from alignx_jax.training.checksums import array_digest
from alignx_jax.training.steps import (
  count_dimensions,
  infer_program,
  posterior_program,
  score_program,
)


@dataclasses.dataclass(frozen=True)
class LogProbs:
  """What scores rows: a model's parameters on a mesh.

  Scorers of the same architecture and sizes share one compiled program.

  Attributes:
    rows: of a global batch.
    chunk: head positions at a time, see objectives.log_probs.
  """

  model: Decoder
  params: nnx.State
  mesh: Mesh
  rows: int
  chunk: int

  @classmethod
  def of(cls, experiment, params: nnx.State) -> "LogProbs":
    """Of an experiment's model with these parameters, in batches of config.eval.rows."""
    config = experiment.config
    return cls(experiment.model, params, experiment.mesh, config.eval.rows, config.train.head_chunk)

  @property
  def own(self) -> np.ndarray:
    """Indices of the rows of a batch that this process reads."""
    return hosts.own_rows(meshes.rows_sharding(self.mesh, self.rows), self.rows)

  def __call__(self, rows: Rows):
    """Response log-probs [B, E, N] in nats, and the slots [B, E] they are of, of all rows.

    Args:
      rows: this process's rows of a batch.
    """
    return self._run(score_program(nnx.graphdef(self.model), self.mesh, self.chunk), rows)

  def log_odds(self, rows: Rows):
    """Log-odds [B, E, P, K] of the P̃ that the model's bridge infers, and their slots [B, E]."""
    return self._run(infer_program(nnx.graphdef(self.model), self.mesh), rows)

  def posterior(self, rows: Rows):
    """Mean and log-variance [B, E, 2, Z] of the latent variable, and their slots [B, E]."""
    return self._run(posterior_program(nnx.graphdef(self.model), self.mesh), rows)

  def _run(self, program, rows):
    rows = hosts.to_devices(rows, meshes.rows_sharding(self.mesh, self.rows), self.rows)
    with jax.set_mesh(self.mesh):
      return program(self.params, rows)


def score_stream(log_probs: LogProbs, loader: Loader, *, describe: str) -> np.ndarray:
  """Response log-probs [slots, N] of every example of a loader's stream; see `stream_values`."""
  return stream_values(log_probs, log_probs.own, loader, (2,), describe=describe)


def posterior_stream(log_probs: LogProbs, loader: Loader, *, describe: str) -> np.ndarray:
  """Mean and log-variance of z [slots, 2, Z] of every example; see `stream_values`."""
  shape = 2, log_probs.model.latent.token_ZTD.shape[0]
  return stream_values(log_probs.posterior, log_probs.own, loader, shape, describe=describe)


def infer_stream(log_probs: LogProbs, loader: Loader, *, describe: str) -> np.ndarray:
  """Log-odds of P̃ [slots, P, K] of every example of a loader's stream; see `stream_values`."""
  shape = count_dimensions(log_probs.model), 3
  return stream_values(log_probs.log_odds, log_probs.own, loader, shape, describe=describe)


def stream_values(
  program: Callable, own: np.ndarray, loader: Loader, shape: tuple[int, ...], *, describe: str
) -> np.ndarray:
  """What a program gives of every example of a loader's stream, in every process.

  Args:
    program: of this process's rows of a batch, to values [B, E, *shape] and slots [B, E].
    own: indices of those rows.
    describe: what the progress bar says.
  Returns:
    float32 [slots, *shape], NaN where the example was refused.
  """
  values = np.full((loader.stream.slots, *shape), np.nan, np.float32)

  def store(value_BE, example_BE) -> int:
    value_BE, example_BE = np.asarray(value_BE), np.asarray(example_BE)
    real_BE = example_BE >= 0
    values[example_BE[real_BE]] = value_BE[real_BE]
    bar.update(int(real_BE.sum()))
    return int(real_BE.sum())

  # Where there are several processes none may stop before the others: they go on with empty
  # rows until a whole batch is empty.
  endless = jax.process_count() > 1
  with tqdm(
    total=loader.stream_length,
    desc=describe,
    unit="ex",
    mininterval=1.0,
    disable=not hosts.is_first(),
  ) as bar:
    pending = None
    for rows, _ in loader.batches(loader.start()[own], endless=endless):
      # Dispatch this batch before waiting for the last one.
      dispatched = program(rows)
      if pending is not None and not store(*pending) and endless:
        break
      pending = dispatched
    else:
      if pending is not None:
        store(*pending)
  loader.report_counts(describe)
  return values


def cached_reference(log_probs: LogProbs, loader: Loader, directory, weights: str) -> np.ndarray:
  """score_stream of the training data, read from `directory` if every process has it there.

  They are scored as Formatting.of_reference prompts. Where nothing is drawn every epoch is
  alike: then one is scored.

  Args:
    log_probs: of the reference.
    weights: fingerprint of its parameters.
  """
  loader = dataclasses.replace(loader, formatting=loader.formatting.of_reference(), grouping=None)
  if not loader.formatting.history.random:
    loader = dataclasses.replace(loader, epochs=1, seed=None, mixture=None)
  key = cache_key(loader, log_probs.model, weights)
  path = epath.Path(directory) / f"reference_{key}.npz"
  scores = _read(path, _load_scores)
  if scores is None:
    with _alone(path):
      scores = _read(path, _load_scores)  # by a run that shares the directory
      if scores is None:
        scores = score_stream(log_probs, loader, describe="reference")
        _write(path, lambda file: np.savez(file, scores=scores))
  return scores


@contextlib.contextmanager
def _alone(path):
  """Waits while another run on a shared local directory makes the same file."""
  if not hosts.is_first() or "://" in str(path):
    yield
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.with_suffix(".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _load_scores(path) -> np.ndarray:
  with path.open("rb") as file:
    return np.load(file, allow_pickle=False)["scores"]  # of a zip file: its CRC is checked


def counted_steps(loader: Loader, directory, own: np.ndarray, *, key: str) -> int:
  """Batches in a loader's stream, counted once and then read from `directory`.

  Args:
    own: the rows of a batch that this process reads.
    key: cache_key of the loader.
  """
  path = epath.Path(directory) / f"steps_{key}_{loader.rows}_{loader.window}_{PACKING}.txt"
  steps = _read(path, _load_steps)
  if steps is None:
    steps = 0
    with tqdm(total=loader.stream_length, desc="counting steps", unit="ex", mininterval=1.0) as bar:
      for rows, _ in loader.batches(loader.start()[own]):
        steps += 1
        bar.update(int((rows.example_BE >= 0).sum()))
    loader.report_counts("training")
    steps = hosts.largest(steps)
    _write(path, lambda file: file.write(f"{steps} {zlib.crc32(str(steps).encode())}\n".encode()))
  return steps


def _load_steps(path) -> int:
  steps, crc = path.read_text().split()
  if zlib.crc32(steps.encode()) != int(crc):
    raise ValueError("another checksum")
  return int(steps)


def _read(path, load):
  """What a file holds, where every process has it whole; else None."""
  value = None
  if path.exists():
    try:
      value = load(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
      logging.warning("%s is damaged (%s): computed again.", path, error)
  return value if hosts.all_true(value is not None) else None


def _write(path, write) -> None:
  """Atomically: where processes share the directory, the last of the same contents stays."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(f".{jax.process_index()}.{os.getpid()}.tmp")
  with partial.open("wb") as file:
    write(file)
  partial.replace(path)


# ------------------------------------------------------------------ what they depend on


def cache_key(loader: Loader, model: Decoder, weights: str) -> str:
  """Hash of all that a stream's log-probs depend on: data, formatting, seed and model.

  Args:
    weights: fingerprint of the reference's parameters.
  """
  formatting = loader.formatting
  settings = (
    loader.seed,
    loader.epochs,
    loader.mixture and loader.mixture[1],
    formatting.tokenizer.fingerprint,
    formatting.space,
    formatting.bridge_space,
    formatting.regions,
    chat_format(formatting.chat),
    prompt_format(formatting.prompt),
    formatting.condition,
    formatting.history,
    model.arch,
    model.compute_dtype.name,
    weights,
  )
  digest = hashlib.sha256(repr(settings).encode())
  if hasattr(loader.examples, "fingerprint"):
    digest.update(loader.examples.fingerprint.encode())
  else:
    for example in loader.examples:
      digest.update(repr(_plain(example)).encode())
  return digest.hexdigest()[:32]


def fingerprint(params: nnx.State) -> str:
  """Stands for the values of a base's parameters, wherever and however split they lie.

  An adapter or a bridge changes nothing of the base, so they are left out.
  """
  params = nnx.split_state(params, (LoraParam, BridgeParam), ...)[1]
  return array_digest(params)


def _plain(value):
  """Nested plain values of a dataclass, arrays as lists, so that repr shows all of it."""
  if dataclasses.is_dataclass(value):
    return [_plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
  if isinstance(value, tuple):
    return [_plain(item) for item in value]
  return value.tolist() if isinstance(value, np.ndarray) else value
