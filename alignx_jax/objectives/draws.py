"""Random numbers of an example and step, the same in whichever row and device it stands."""

from collections.abc import Callable

import jax


def draw_each(draw: Callable, seed: int, step, example_BE):
  """draw(key) for each example: [B, E, …].

  Args:
    step: of the run, an int32 scalar.
    example_BE: slots of the examples in their stream.
  """
  key = jax.random.fold_in(jax.random.key(seed), step)
  of_example = lambda example: draw(jax.random.fold_in(key, example))
  return jax.vmap(jax.vmap(of_example))(example_BE)
