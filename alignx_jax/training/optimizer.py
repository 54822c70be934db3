"""AdamW with warm-up and cosine decay, through optax."""

import jax
import optax


def learning_rate(config, steps: int, peak: float) -> optax.Schedule:
  """Linear warm-up to the peak over a share of `steps`, then cosine to a share of the peak.

  Step i of w warm-up steps has (i + 1) / w of the peak: no step is spent at 0.
  """
  warmup = round(config.warmup_share * steps)
  decay = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=config.final_share)
  if not warmup:
    return decay
  rise = optax.linear_schedule(peak / warmup, peak, warmup - 1)
  return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(
  config, steps: int, *, bridge_learning_rate: float = 0.0
) -> optax.GradientTransformation:
  """Clip by global norm, then AdamW.

  Args:
    config: config.optimizer of configs/base.py.
    steps: optimiser steps of the whole run.
    bridge_learning_rate: peak for the parameters of a learned bridge or a latent variable, which
      are clipped by a norm of their own; 0 if there are none.
  """

  def adamw(peak: float) -> optax.GradientTransformation:
    return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(
        learning_rate(config, steps, peak),
        b1=config.b1,
        b2=config.b2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
      ),
    )

  model = adamw(config.learning_rate)
  if not bridge_learning_rate:
    return model

  def labels(params):
    def of(path, _):
      name = jax.tree_util.keystr(path)
      return "bridge" if "'bridge'" in name or "'latent'" in name else "model"

    return jax.tree_util.tree_map_with_path(of, params)

  return optax.partition({"model": model, "bridge": adamw(bridge_learning_rate)}, labels)
