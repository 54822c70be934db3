"""Which examples train and test, and what labels them."""

import json
import re

import numpy as np
import pytest

from alignx_jax.data.records import read_examples
from alignx_jax.data.splits import label_by_profile, load_splits
from alignx_jax.personas.preferences import alignx_space
from configs import base

SPACE = alignx_space()
POLES = SPACE.dimensions[3].positive, SPACE.dimensions[7].negative


def _splits(path, records, **fields):
  path.write_text(json.dumps(records))
  config = base.get_config().data
  config.update({"path": str(path), "profile_labels": True} | fields)
  return load_splits(config, SPACE, seed=0)


def _record(i, **fields):
  pair = {"prompt": "Shown.", "chosen": "yes", "rejected": "no"}
  record = {"prompt": f"Post {i}?", "chosen": "yes", "rejected": "no"}
  return record | {"Pair-wise Comparative Feedback": [pair]} | fields


def test_a_profile_labels_a_record_that_has_no_other_label(tmp_path):
  own = [0.0] * len(SPACE)
  records = [
    _record(0, profile=", ".join(POLES)),
    _record(1, profile=", ".join(POLES), **{"Preference Direction": own}),
    _record(2),
  ]
  splits = _splits(tmp_path / "records.json", records)
  directions = {e.post: e.directions for part in splits.values() for e in part}
  expected = np.full(len(SPACE), 0.5)
  expected[[3, 7]] = 1, 0
  np.testing.assert_array_equal(directions["Post 0?"], expected)
  np.testing.assert_array_equal(directions["Post 1?"], own)
  assert directions["Post 2?"] is None

  unlabelled = _splits(tmp_path / "records.json", records, profile_labels=False)
  assert sum(e.directions is not None for part in unlabelled.values() for e in part) == 1


@pytest.mark.parametrize(
  "profile", ["Likes nothing at all", f"{SPACE.dimensions[3].negative}, {POLES[0]}"]
)
def test_a_profile_that_is_no_list_of_poles_is_refused_by_record_and_field(tmp_path, profile):
  records = [_record(0), _record(1, profile=profile)]
  wrong = profile.removeprefix(SPACE.dimensions[3].negative + ", ")
  with pytest.raises(ValueError, match=rf"records\.json:1, 'profile': '{re.escape(wrong)}'"):
    _splits(tmp_path / "records.json", records)


def test_an_empty_list_is_refused_as_such(tmp_path):
  with pytest.raises(ValueError, match="has no records"):
    _splits(tmp_path / "records.json", [])


def test_every_published_profile_is_a_label(p_soups):
  for example in read_examples(p_soups, SPACE):
    labelled = label_by_profile(example, SPACE)
    assert SPACE.verbalise(labelled.directions) == example.profile
