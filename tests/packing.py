"""Rows from hand-made token ids, through the same packer as the loader's."""

import grain

from alignx_jax.data.rows import PER_EXAMPLE, assemble, length_struct, make_features


def pack(examples, regions, *, rows=1, bins=4):
  """One batch of Rows from a list of (context, chosen, rejected) ids; all must fit."""
  features = [make_features(*ids, index=i) for i, ids in enumerate(examples)]
  data = grain.experimental.FirstFitPackIterDataset(
    grain.MapDataset.source(features).to_iter_dataset(),
    length_struct=length_struct(regions),
    num_packing_bins=bins,
    meta_features=PER_EXAMPLE,
    shuffle_bins=False,
  ).batch(rows, drop_remainder=False)
  batches = [assemble(batch, rows=rows) for batch in data]
  assert len(batches) == 1, "give enough rows for all examples"
  return batches[0]
