"""Which examples train and which test, for simulated users and for JSON lists."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from alignx_jax.data.prepared import is_prepared, open_prepared
from alignx_jax.data.records import (
  COMMENTS,
  DESCRIPTION,
  PAIRS,
  Example,
  parse_record,
  read_examples,
)
from alignx_jax.personas.preferences import PreferenceSpace
from alignx_jax.personas.simulator import SimulatorConfig, simulate_record


def load_splits(config, space: PreferenceSpace, *, seed: int) -> dict[str, Sequence[Example]]:
  """{"train": …, "validation": …, "test": …} of config.data.

  A prepared set has its splits, and tests on its validation split if it has no other; one with
  a test split alone (a benchmark) is divided by posts, as a JSON list is. These have no
  validation split: it is empty.

  Raises:
    FileNotFoundError, ValueError: the file, record or field at fault and what to do.
  """
  if config.path == "simulated":
    sizes = {
      "train": config.train_records,
      "validation": config.validation_records,
      "test": config.test_records,
    }
    for split, size in sizes.items():
      if size is None or (not size and split != "validation"):
        raise ValueError(f"Simulated data has no end; set config.data.{split}_records.")
    return {
      split: simulated_examples(
        size,
        split=split,
        space=space,
        seed=seed,
        users=SimulatorConfig(demographics=config.demographics),
      )
      for split, size in sizes.items()
    }
  if config.demographics is not None:
    raise ValueError(
      "config.data.demographics is of simulated users; leave it None where people are real."
    )
  if not config.path:
    raise ValueError(
      "config.data.path is empty; set it to a JSON list of records or a prepared directory."
    )
  if is_prepared(config.path):
    splits = open_prepared(config.path)
    if "train" in splits:
      if config.profile_labels:
        raise ValueError(
          "config.data.profile_labels is of a JSON list or a benchmark; the records of "
          f"{config.path} are labelled as they are."
        )
      return {
        "train": splits["train"][: config.train_records],
        "validation": splits["validation"][: config.validation_records],
        "test": splits.get("test", splits["validation"])[: config.test_records],
      }
    examples = list(splits["test"])
  else:
    examples = read_examples(config.path, space)
  if not examples:
    raise ValueError(f"{config.path} has no records.")
  if config.profile_labels:
    examples = [label_by_profile(example, space) for example in examples]
  splits = split_by_post(examples, test_share=config.test_share, seed=seed)
  splits["train"] = splits["train"][: config.train_records]
  splits["test"] = splits["test"][: config.test_records]
  for split, part in splits.items():
    if not part:
      raise ValueError(
        f"{config.path} leaves no {split} examples; set config.data.test_share between 0 and 1. "
        "(Posts that occur in a history never test.)"
      )
  if not any(e.persona.history or e.persona.description for e in splits["train"]):
    raise ValueError(
      f"No training record of {config.path} has a persona: none of {COMMENTS!r}, {PAIRS!r} "
      f"or {DESCRIPTION!r}; check how the fields are spelt."
    )
  return splits | {"validation": []}


def simulated_examples(
  size: int,
  *,
  split: str,
  space: PreferenceSpace,
  seed: int,
  users: SimulatorConfig = SimulatorConfig(),
) -> list[Example]:
  """The first `size` simulated users of a split, one example each.

  Args:
    users: how they and their texts are drawn.
  """
  indices = tqdm(range(size), desc=f"simulating {split}", unit="user", mininterval=1.0)
  record = lambda i: simulate_record(i, split=split, seed=seed, config=users)
  return [parse_record(record(i), space, f"simulated_{split}:{i}") for i in indices]


def label_by_profile(example: Example, space: PreferenceSpace) -> Example:
  """An example whose directions, where the record has none, are what its profile says.

  Raises:
    ValueError: the profile has a part that is no pole; names the record.
  """
  if example.directions is not None or example.profile is None:
    return example
  try:
    directions_P = space.parse(example.profile)
  except ValueError as error:
    raise ValueError(f"{example.id}, 'profile': {error}") from None
  return dataclasses.replace(example, directions=directions_P.astype(np.float32))


def split_by_post(
  examples: Sequence[Example], *, test_share: float, seed: int
) -> dict[str, list[Example]]:
  """Splits so that no test post is seen in training, neither as a post nor in a history.

  Posts that occur in anyone's history go to training, so that the histories of training
  cannot hold a test pair; of the rest a seeded choice goes to test, up to `test_share` of
  all posts.
  """
  posts = list(dict.fromkeys(example.post for example in examples))
  shown = {item.post for example in examples for item in example.persona.history}
  eligible = sorted(set(posts) - shown)
  count = min(round(test_share * len(posts)), len(eligible))
  order = np.random.default_rng(seed).permutation(len(eligible))
  test = {eligible[i] for i in order[:count]}
  return {
    "train": [e for e in examples if e.post not in test],
    "test": [e for e in examples if e.post in test],
  }
