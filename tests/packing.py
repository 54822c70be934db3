"""Rows from hand-made token ids, laid out as the loader does."""

from alignx_jax.data.loader import choose
from alignx_jax.data.rows import Tokenised, lay_out, stack


def pack(examples, regions, *, rows=1):
  """One batch of Rows from a list of (context, chosen, rejected) ids; all must fit."""
  left = list(enumerate(Tokenised(*ids) for ids in examples))
  packed = []
  for _ in range(rows):
    taken = choose([ids.sizes for _, ids in left], regions) if left else []
    indices = [left[i][0] for i in taken]
    packed.append(lay_out([left[i][1] for i in taken], regions, indices=indices))
    left = [item for i, item in enumerate(left) if i not in taken]
  assert not left, "give enough rows for all examples"
  return stack(packed)
