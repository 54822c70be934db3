"""Architecture sizes by name. A model family is data: one decoder serves all."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1's stretching of low rotary frequencies (meta-llama, rope_type "llama3")."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_positions: int

  def __post_init__(self):
    _check_positive(self, float, "factor", "low_freq_factor", "high_freq_factor")
    _check_positive(self, int, "original_max_positions")
    if self.low_freq_factor >= self.high_freq_factor:
      raise ValueError(
        f"rope scaling has low_freq_factor {self.low_freq_factor} and high_freq_factor "
        f"{self.high_freq_factor}; the low one must be below the high one."
      )


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Sizes of a Llama-family decoder.

  Attributes:
    attention_bias: whether the q, k and v projections have a bias (Qwen2.5).
    tied: whether the head is the embedding table.
    max_positions: the longest sequence the weights were made for.
  Raises:
    ValueError: a size is not a whole number above 0, or two do not go together.
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
    _check_positive(self, int, "vocab_size", "width", "layers", "heads", "kv_heads")
    _check_positive(self, int, "head_width", "feed_forward", "max_positions")
    _check_positive(self, float, "rope_theta", "norm_epsilon")
    for name in ("tied", "attention_bias"):
      if not isinstance(getattr(self, name), bool):
        raise ValueError(f"{name} is {getattr(self, name)!r}; it must be true or false.")
    if self.heads % self.kv_heads:
      raise ValueError(
        f"{self.heads} heads do not divide by {self.kv_heads} key/value heads: "
        "each key/value head serves the same number of query heads."
      )
    if self.head_width % 2:
      raise ValueError(f"head_width is {self.head_width}; rotary positions need an even one.")


def _check_positive(sizes, kind, *names):
  for name in names:
    value = getattr(sizes, name)
    # A bool is an int in Python; infinity and NaN are floats.
    fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not fits or not 0 < value < float("inf"):
      number = "whole number" if kind is int else "number"
      raise ValueError(f"{name} is {value!r}; it must be a {number} above 0.")


_LLAMA3 = Architecture(
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
)
_LLAMA32 = dataclasses.replace(
  _LLAMA3, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192), feed_forward=8192, tied=True
)
# Of Qwen2.5, max_positions are those of the Instruct models: some bases state more.
_QWEN25 = Architecture(
  vocab_size=152064,
  width=3584,
  layers=28,
  heads=28,
  kv_heads=4,
  head_width=128,
  feed_forward=18944,
  rope_theta=1_000_000.0,
  norm_epsilon=1e-6,
  tied=False,
  attention_bias=True,
  max_positions=32768,
)
_MISTRAL = Architecture(
  vocab_size=32768,
  width=4096,
  layers=32,
  heads=32,
  kv_heads=8,
  head_width=128,
  feed_forward=14336,
  rope_theta=1_000_000.0,
  tied=False,
  max_positions=32768,
)
_SMOLLM2 = Architecture(
  vocab_size=49152,
  width=576,
  layers=30,
  heads=9,
  kv_heads=3,
  head_width=64,
  feed_forward=1536,
  rope_theta=100_000.0,
)

PRESETS = {
  # For tests: the shortest steps there are.
  "tiny": Architecture(
    vocab_size=300, width=32, layers=2, heads=4, kv_heads=2, head_width=8, feed_forward=64
  ),
  # For tests of splitting: sizes that divide by eight devices (the key/value heads by four), and
  # every kind of parameter.
  "tiny8": Architecture(
    vocab_size=320,
    width=64,
    layers=2,
    heads=8,
    kv_heads=4,
    head_width=8,
    feed_forward=128,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
    tied=False,
    attention_bias=True,
  ),
  # The base of the simulated study: fits in the package, trains in minutes on two cores.
  "simulated_base": Architecture(
    vocab_size=2048, width=128, layers=4, heads=2, kv_heads=2, head_width=64, feed_forward=384
  ),
  "smollm2_135m": _SMOLLM2,
  "smollm2_360m": dataclasses.replace(
    _SMOLLM2, width=960, layers=32, heads=15, kv_heads=5, feed_forward=2560
  ),
  "smollm2_17b": dataclasses.replace(
    _SMOLLM2,
    width=2048,
    layers=24,
    heads=32,
    kv_heads=32,
    feed_forward=8192,
    rope_theta=130_000.0,
  ),
  "llama31_8b": _LLAMA3,
  "llama31_70b": dataclasses.replace(_LLAMA3, width=8192, layers=80, heads=64, feed_forward=28672),
  "llama32_1b": dataclasses.replace(_LLAMA32, width=2048, layers=16, head_width=64),
  "llama32_3b": dataclasses.replace(_LLAMA32, width=3072, layers=28, heads=24),
  "mistral_7b_v02": dataclasses.replace(_MISTRAL, vocab_size=32000),
  "mistral_7b_v03": _MISTRAL,
  "qwen25_05b": dataclasses.replace(
    _QWEN25,
    vocab_size=151936,
    width=896,
    layers=24,
    heads=14,
    kv_heads=2,
    head_width=64,
    feed_forward=4864,
    tied=True,
  ),
  "qwen25_7b": _QWEN25,
}


def get_architecture(name: str) -> Architecture:
  """The architecture of a preset; ValueError lists the names when there is none."""
  if name not in PRESETS:
    raise ValueError(f"No preset {name!r}. There are: {', '.join(sorted(PRESETS))}.")
  return PRESETS[name]
