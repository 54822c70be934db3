"""AdamW with warm-up and cosine decay, through optax."""

import optax


def learning_rate(config, steps: int) -> optax.Schedule:
  """Linear warm-up to the peak over a share of `steps`, then cosine to a share of the peak.

  Step i of w warm-up steps has (i + 1) / w of the peak: no step is spent at 0.
  """
  warmup = round(config.warmup_share * steps)
  peak = config.learning_rate
  decay = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=config.final_share)
  if not warmup:
    return decay
  rise = optax.linear_schedule(peak / warmup, peak, warmup - 1)
  return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config, steps: int) -> optax.GradientTransformation:
  """Clip by global norm, then AdamW.

  Args:
    config: config.optimizer of configs/base.py.
    steps: optimiser steps of the whole run.
  """
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      learning_rate(config, steps),
      b1=config.b1,
      b2=config.b2,
      eps=config.epsilon,
      weight_decay=config.weight_decay,
    ),
  )
