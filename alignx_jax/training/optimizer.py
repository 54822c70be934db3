"""AdamW with warm-up and cosine decay, through optax."""

import optax


def learning_rate(config, steps: int) -> optax.Schedule:
  """Linear warm-up from 0 over a share of `steps`, then cosine to a share of the peak."""
  warmup = max(1, round(config.warmup_share * steps))
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=warmup,
    decay_steps=max(steps, warmup + 1),
    end_value=config.learning_rate * config.final_share,
  )


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
