"""What a sweep tries: trials, and generators of the overrides that make them.

A sweep is a Python file with two functions: `get_config()`, as in any config, and `get_sweep()`,
which yields `Trial`s. Overrides are dicts of config field -> value; the functions here yield them,
and plain Python joins, filters and conditions them:

  def get_sweep():
    for overrides in grid({"objective.beta": (0.03, 0.1), "seed": range(3)}):
      if overrides["objective.beta"] > 0.05 or overrides["seed"] == 0:
        yield trial(overrides)
"""

import collections
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Overrides = dict[str, Any]


class Trial(NamedTuple):
  """One run of a sweep.

  Attributes:
    name: of its folder: letters, digits and . _ = , + -.
    overrides: config field -> value.
    factors: what the tables and pictures compare, name -> value; empty: the overrides.
  """

  name: str
  overrides: Overrides
  factors: Mapping[str, Any] = {}


def trial(overrides: Overrides, factors: Mapping[str, Any] | None = None) -> Trial:
  """A trial named after its factors, or else its overrides."""
  factors = dict(factors or {})
  return Trial(name_of(factors or overrides), overrides, factors)


def name_of(values: Mapping[str, Any]) -> str:
  """Such as "beta=0.1,seed=0": last parts of the fields' names, where these differ."""
  last = {field: field.rpartition(".")[2] for field in values}
  count = collections.Counter(last.values())
  label = lambda field: last[field] if count[last[field]] == 1 else field
  text = ",".join(f"{label(field)}={plain(value)}" for field, value in values.items())
  return re.sub(r"[^A-Za-z0-9._=,+-]+", "_", text)


def plain(value: Any) -> str:
  """A value as short text."""
  if isinstance(value, (list, tuple)):
    return "+".join(map(plain, value)) or "none"
  if isinstance(value, float):
    return f"{value:.4g}"
  return str(value)


def grid(axes: Mapping[str, Iterable]) -> Iterator[Overrides]:
  """Every combination of the values of each field; the last field changes fastest."""
  for values in itertools.product(*axes.values()):
    yield dict(zip(axes, values, strict=True))


def cross(*parts: Iterable[Overrides]) -> Iterator[Overrides]:
  """Every combination of overrides, one of each part; the last part changes fastest.

  Raises:
    ValueError: two parts set one field.
  """
  for combination in itertools.product(*parts):
    fields = [field for overrides in combination for field in overrides]
    if len(set(fields)) < len(fields):
      twice = next(field for field in fields if fields.count(field) > 1)
      raise ValueError(f"Two parts of a cross set {twice!r}; leave it out of one.")
    yield {field: value for overrides in combination for field, value in overrides.items()}


def sample(
  count: int, draws: Mapping[str, Callable | Sequence], *, seed: int = 0
) -> Iterator[Overrides]:
  """Random overrides, the same for the same seed.

  Args:
    draws: field -> values of which one is drawn, or a function of a NumPy generator, as
      `uniform` and `log_uniform` make.
  """
  rng = np.random.default_rng(seed)
  for _ in range(count):
    yield {
      field: draw(rng) if callable(draw) else draw[int(rng.integers(len(draw)))]
      for field, draw in draws.items()
    }


def uniform(low: float, high: float) -> Callable:
  """Draws from low to high, to four digits."""
  return lambda rng: float(f"{rng.uniform(low, high):.4g}")


def log_uniform(low: float, high: float) -> Callable:
  """Draws from low to high, both above 0, every factor as likely, to four digits."""
  return lambda rng: float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.4g}")
