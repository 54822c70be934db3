"""Pre-training of the small base model of the simulated study.

What a base must bring is the ability to read its context. Small decoders find it late in
simulated text alone, so training starts with what needs nothing else: random tokens that
repeat, of which all but the first round can be known by copying (the task on which
induction heads appear, Olsson et al. 2022). Simulated text follows, in which copying what
an author has said before pays too.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers
from tqdm import tqdm

from alignx_jax.data.tokenizers import Tokenizer, load_tokenizer, train_bpe
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import get_architecture
from alignx_jax.models.pretrained import save_decoder
from alignx_jax.objectives.log_probs import token_log_probs
from alignx_jax.personas.prompts import text_of
from alignx_jax.personas.simulator import simulate_document
from alignx_jax.training.checkpoints import Checkpoints
from alignx_jax.training.metrics import MetricWriter, divide
from alignx_jax.training.steps import TrainState


def make_tokenizer(config, directory: Path) -> Tokenizer:
  """Byte-level BPE of simulated text, written to `directory` with its settings."""
  specials = ["<|im_start|>", "<|im_end|>"]
  documents = range(config.tokenizer.documents)
  texts = (text_of(simulate_document(i, seed=config.seed)) for i in documents)
  train_bpe(texts, config.tokenizer.vocab_size, specials, directory, eos="<|im_end|>")
  return load_tokenizer(directory)


def repeats(rng: np.random.Generator, *, rows: int, length: int, vocab_size: int):
  """Rows of random ids that repeat with a period of 4 to half a row.

  Returns:
    ids and segments, both int32 [rows, length].
  """
  ids_BL = np.zeros((rows, length), np.int32)
  for row_L in ids_BL:
    period = rng.integers(4, length // 2 + 1)
    row_L[:] = np.resize(rng.integers(vocab_size, size=period), length)
  return ids_BL, np.ones_like(ids_BL)


def documents(rng: np.random.Generator, tokenizer: Tokenizer, *, rows: int, length: int, seed: int):
  """Rows of simulated documents, one segment each; the last of a row is cut at its end.

  Returns:
    ids and segments, both int32 [rows, length].
  """
  ids_BL, segments_BL = np.zeros((2, rows, length), np.int32)
  for ids_L, segments_L in zip(ids_BL, segments_BL, strict=True):
    filled = segment = 0
    while filled < length:
      document = simulate_document(int(rng.integers(2**31)), seed=seed)
      ids = tokenizer.encode_pieces(document)[: length - filled]
      segment += 1
      ids_L[filled : filled + len(ids)] = ids
      segments_L[filled : filled + len(ids)] = segment
      filled += len(ids)
  return ids_BL, segments_BL


def batch(config, tokenizer: Tokenizer, step: int):
  """The batch of a step, a function of the seed and the step alone.

  Returns:
    ids and segments [B, L + 1] as `repeats` and `documents` give them.
  """
  rng = np.random.default_rng([config.seed, step])
  phase = _phase(config, step)
  size = {"rows": phase.rows, "length": phase.length + 1}
  if rng.random() < phase.repeats:
    return repeats(rng, vocab_size=tokenizer.vocab_size, **size)
  return documents(rng, tokenizer, seed=config.seed, **size)


def _phase(config, step: int):
  for phase in config.phases:
    if step < phase.steps:
      return phase
    step -= phase.steps
  raise IndexError(step)


def make_optimizer(config, params, steps: int) -> optax.GradientTransformation:
  """Muon (Jordan et al. 2024) for the layers' matrices, Adam for embeddings and norms."""

  def dimensions(path, leaf):
    name = jax.tree_util.keystr(path)
    if "blocks" not in name or "norm" in name:
      return None
    if "o_HAD" in name:
      return MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=3)
    return MuonDimensionNumbers(reduction_axis=1, output_axis=tuple(range(2, leaf.ndim)))

  def schedule(peak):
    return optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup, steps, 0.05 * peak)

  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.contrib.muon(
      schedule(config.muon_learning_rate),
      adam_learning_rate=schedule(config.adam_learning_rate),
      adam_b2=0.95,
      muon_weight_dimension_numbers=jax.tree_util.tree_map_with_path(dimensions, params),
    ),
  )


def next_token_loss(model: Decoder, ids_BL, segments_BL):
  """Cross-entropy of each token from those before it in its segment.

  Args:
    ids_BL, segments_BL: as `batch` gives them; inputs are all but the last of each row.
  Returns:
    (summed nats, tokens).
  """
  index_L = jnp.arange(segments_BL.shape[1])
  starts_BL = jnp.diff(segments_BL, prepend=0, axis=1) > 0
  positions_BL = index_L - jax.lax.cummax(jnp.where(starts_BL, index_L, 0), axis=1)
  hidden_BLD = model(ids_BL[:, :-1], positions_BL[:, :-1], segments_BL[:, :-1])
  log_probs_BL = token_log_probs(hidden_BLD, model.head, ids_BL[:, 1:])
  inside_BL = segments_BL[:, 1:] == segments_BL[:, :-1]
  return -jnp.sum(jnp.where(inside_BL, log_probs_BL, 0.0)), jnp.sum(inside_BL)


def pretrain(config, workdir: Path) -> Path:
  """Trains tokenizer and base; the same call again goes on from the newest checkpoint.

  Args:
    config: configs/base_model_simulated.py's.
    workdir: gets checkpoints, metrics and `model/`, a Hugging Face directory.
  Returns:
    The directory of the model, whose weights are bfloat16.
  """
  directory = workdir / "model"
  tokenizer = make_tokenizer(config, directory)
  arch = get_architecture(config.preset)
  if tokenizer.vocab_size != arch.vocab_size:
    raise ValueError(
      f"The tokenizer has {tokenizer.vocab_size} ids and preset {config.preset!r} embeds "
      f"{arch.vocab_size}; set config.tokenizer.vocab_size to that."
    )
  graph, params = nnx.split(Decoder(arch, rngs=nnx.Rngs(config.seed), remat=False))
  steps = sum(phase.steps for phase in config.phases)
  optimizer = make_optimizer(config, params, steps)
  state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

  def mean_loss(params, ids_BL, segments_BL):
    nats, tokens = next_token_loss(nnx.merge(graph, params), ids_BL, segments_BL)
    return nats / tokens, {"loss": (nats, tokens)}

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state, ids_BL, segments_BL):
    gradient, metrics = jax.grad(mean_loss, has_aux=True)(state.params, ids_BL, segments_BL)
    updates, moments = optimizer.update(gradient, state.optimizer, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), moments), metrics

  checkpoints = Checkpoints(workdir, keep=1)
  found = checkpoints.newest(state)
  first, state = (found.step, found.state) if found else (0, state)
  writer = MetricWriter(workdir, first)
  for step in (bar := tqdm(range(first, steps), initial=first, total=steps, desc="base")):
    state, metrics = train_step(state, *batch(config, tokenizer, step))
    if (step + 1) % config.log_every == 0 or step + 1 == steps:
      metrics = divide(jax.device_get(metrics))
      writer.write(step, metrics)
      bar.set_postfix_str(f"loss {metrics['loss']:.3f}")
      if not np.isfinite(metrics["loss"]):
        raise FloatingPointError(f"Loss {metrics['loss']} at step {step}; lower the rates.")
    if (step + 1) % config.checkpoint_every == 0 or step + 1 == steps:
      checkpoints.save(step + 1, state, {})
  checkpoints.close()
  writer.close()
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
  save_decoder(nnx.merge(graph, half), directory)
  return directory
