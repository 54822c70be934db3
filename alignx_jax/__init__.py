"""alignx_jax: language models aligned to each user, in JAX.

Array names end in one letter per axis. The one legend:

  B  rows of a batch            V  vocabulary
  L  layout of a row, C + 2R    D  width of the model
  C  context region             H  query heads
  R  response region            K  key/value heads
  N  branch, 2: 0 is chosen     G  query heads per key/value head
  E  examples of a row          A  width of one head
  P  preference dimensions, 90  F  width of the feed-forward layer
  U  persona region             Q  poles of a dimension, 2: 0 is negative
  Z  latent user variable       M  width of what encodes it

`S` and `T` stand for query and key positions where an array holds both, and a
leading `X` for any stack of layers, users or parts of personas. After `P`, `K` stands for the
three directions of a dimension: negative, neutral, positive.
"""

__version__ = "0.1.0"
