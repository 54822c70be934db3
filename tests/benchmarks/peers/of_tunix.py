"""Tunix's DPOTrainer, for tests/benchmarks/train_step.py; runs in an environment with Tunix alone.

Its Llama takes rope_theta and does not use it: the rotary embedding is told it here. The trainer
computes the reference's log-probs in each step.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput
from turns import Turns


def load(turns: Turns):
  """The model with the benchmark's weights."""
  arch = turns.batch["architecture"]
  assert arch["rope_scaling"] is None and not arch["attention_bias"]
  remat = llama.RematConfig.DECODER if turns.batch["remat"] else llama.RematConfig.NONE
  config = llama.ModelConfig(
    num_layers=arch["layers"],
    vocab_size=arch["vocab_size"],
    embed_dim=arch["width"],
    hidden_dim=arch["feed_forward"],
    num_heads=arch["heads"],
    head_dim=arch["head_width"],
    num_kv_heads=arch["kv_heads"],
    rope_theta=arch["rope_theta"],
    norm_eps=arch["norm_epsilon"],
    weight_tying=arch["tied"],
    remat_config=remat,
  )
  return params.create_model_from_safe_tensors(
    str(turns.directory / "weights"), config, dtype=jnp.float32
  )


def padded(examples: list[dict]) -> TrainingInput:
  """The batch, padded to its own longest context and response."""

  def pad(lists, *, left):
    length = max(map(len, lists))
    ids, mask = np.zeros((2, len(lists), length), np.int32)
    for i, own in enumerate(lists):
      place = slice(length - len(own), None) if left else slice(len(own))
      ids[i, place], mask[i, place] = own, 1
    return ids, mask

  prompt = pad([x["context"] for x in examples], left=True)
  # Both branches go through the model as one batch, of one length.
  both = pad([x[branch] for branch in ("chosen", "rejected") for x in examples], left=False)
  chosen, rejected = zip(*(np.split(array, 2) for array in both), strict=True)
  return TrainingInput(*prompt, *chosen, *rejected)


def main():
  turns = Turns()
  batch = turns.batch
  theta = batch["architecture"]["rope_theta"]
  llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=theta)
  settings = batch["optimizer"]
  optimizer = optax.chain(
    optax.clip_by_global_norm(settings["clip_norm"]),
    optax.adamw(
      settings["learning_rate"],
      b1=settings["b1"],
      b2=settings["b2"],
      eps=settings["epsilon"],
      weight_decay=settings["weight_decay"],
    ),
  )
  trainer = DPOTrainer(
    model=load(turns),
    ref_model=load(turns),
    optimizer=optimizer,
    training_config=DPOTrainingConfig(eval_every_n_steps=1 << 30, beta=batch["beta"]),
  )
  examples = padded(batch["examples"])
  found = trainer._prepare_inputs(examples)
  log_probs = np.stack([found.ref_chosen_logps, found.ref_rejected_logps], axis=1)
  turns.tell(log_probs=log_probs.tolist())

  def batches():
    while turns.wait():
      yield examples
      # The trainer asks for the next batch when it has begun the step: its end is waited for.
      jax.block_until_ready(nnx.state(trainer.model))
      turns.done(trainer._prev_buffered_train_metrics.loss)

  trainer.train(batches())


if __name__ == "__main__":
  main()
