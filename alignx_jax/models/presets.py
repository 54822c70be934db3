"""Architecture sizes by name. A model family is data: one decoder serves all."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1's stretching of low rotary frequencies (meta-llama, rope_type "llama3")."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_positions: int


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Sizes of a Llama-family decoder.

  Attributes:
    attention_bias: whether the q, k and v projections have a bias (Qwen2.5).
    tied: whether the head is the embedding table.
    max_positions: the longest sequence the weights were made for.
  """

  vocab_size: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_width: int
  feed_forward: int
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  norm_epsilon: float = 1e-5
  tied: bool = True
  attention_bias: bool = False
  max_positions: int = 8192

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(
        f"{self.heads} heads do not divide by {self.kv_heads} key/value heads: "
        "each key/value head serves the same number of query heads."
      )


PRESETS = {
  # For tests: every code path, milliseconds a step.
  "tiny": Architecture(
    vocab_size=300, width=32, layers=2, heads=4, kv_heads=2, head_width=8, feed_forward=64
  ),
  # The base of the simulated study: fits in the package, trains in minutes on two cores.
  "simulated_base": Architecture(
    vocab_size=2048, width=128, layers=4, heads=2, kv_heads=2, head_width=64, feed_forward=384
  ),
  "smollm2_135m": Architecture(
    vocab_size=49152,
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_width=64,
    feed_forward=1536,
    rope_theta=100_000.0,
  ),
  "llama31_8b": Architecture(
    vocab_size=128256,
    width=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_width=128,
    feed_forward=14336,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    tied=False,
    max_positions=131072,
  ),
}


def get_architecture(name: str) -> Architecture:
  """The architecture of a preset; ValueError lists the names when there is none."""
  if name not in PRESETS:
    raise ValueError(f"No preset {name!r}. There are: {', '.join(sorted(PRESETS))}.")
  return PRESETS[name]
