"""Properties of the packed row: packed equals unpacked, and nothing leaks inside it."""

import jax
import numpy as np
import pytest
from flax import nnx

from alignx_jax.data.rows import Regions
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import get_architecture
from alignx_jax.objectives.log_probs import response_log_probs, token_log_probs
from tests.packing import pack

REGIONS = Regions(context=64, response=24, examples=4)


def _ids(rng, length):
  return rng.integers(0, 256, length).tolist()


@pytest.fixture(scope="module")
def model():
  return Decoder(get_architecture("tiny"), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def log_probs(model):
  return jax.jit(lambda rows: response_log_probs(model, rows, chunk=7))


@pytest.fixture(scope="module")
def examples():
  rng = np.random.default_rng(0)
  return [tuple(_ids(rng, n) for n in sizes) for sizes in ((20, 7, 3), (9, 5, 9), (25, 1, 8))]


def test_packed_equals_each_sequence_by_itself(model, log_probs, examples):
  packed_BNE = log_probs(pack(examples, REGIONS))
  for e, (context, *responses) in enumerate(examples):
    for n, response in enumerate(responses):
      tokens = np.asarray(context + response)[None]
      positions = np.arange(tokens.shape[1])[None]
      hidden = model(tokens, positions, np.ones_like(tokens))
      alone = token_log_probs(hidden[:, :-1], model.head, tokens[:, 1:])
      expected = alone[0, len(context) - 1 :].sum()
      np.testing.assert_allclose(packed_BNE[0, n, e], expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(packed_BNE[0, :, 3], 0)


def test_rejected_is_blind_to_chosen_and_chosen_to_rejected(log_probs, examples):
  before = log_probs(pack(examples, REGIONS))
  rng = np.random.default_rng(1)
  for branch, other in ((1, 0), (2, 1)):
    changed = [list(example) for example in examples]
    for example in changed:
      example[branch] = _ids(rng, len(example[branch]))
    after = log_probs(pack(changed, REGIONS))
    np.testing.assert_array_equal(before[:, 2 - branch], after[:, 2 - branch])
    assert np.all(before[:, other, :3] != after[:, other, :3])


def test_one_user_never_reaches_another(log_probs, examples):
  before = log_probs(pack(examples, REGIONS))
  rng = np.random.default_rng(2)
  changed = [tuple(_ids(rng, len(part)) for part in examples[0]), *examples[1:]]
  after = log_probs(pack(changed, REGIONS))
  np.testing.assert_array_equal(before[..., 1:], after[..., 1:])
  assert np.all(before[..., 0] != after[..., 0])


def test_order_of_users_in_a_row_changes_nothing(log_probs, examples):
  before = log_probs(pack(examples, REGIONS))
  order = [2, 0, 1]
  after = log_probs(pack([examples[i] for i in order], REGIONS))
  np.testing.assert_allclose(before[..., order], after[..., :3], rtol=1e-5, atol=1e-5)


def test_an_example_longer_than_its_region_is_refused_by_the_packer(examples):
  with pytest.raises(ValueError, match="(?i)exceed|larger|long"):
    pack(examples, Regions(context=16, response=24, examples=4))
