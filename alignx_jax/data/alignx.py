"""The AlignX data sets for TFDS: one schema, one builder config for each published set.

  import alignx_jax.data.alignx, tensorflow_datasets as tfds
  tfds.data_source("alignx/p_soups", data_dir=DIR)

reads what `python -m alignx_jax.prepare_data` wrote to DIR, without TensorFlow.
`download_and_prepare` works too, from files in TFDS's manual directory, but neither
resumes nor keeps a list of what it refused.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from alignx_jax.data.records import Example, RecordError, parse_record
from alignx_jax.data.sources import SIMULATED, Part, Refusal, find_files, find_parts, read_part
from alignx_jax.personas.persona import ComparedPair, Persona, UserComment
from alignx_jax.personas.preferences import PreferenceSpace, alignx_space

# How a direction is stored: its double, or that nobody recorded it.
_UNKNOWN = 3

# Records of each source of the published training set. UltraFeedback's are 11,629 for
# helpfulness, 16,809 honesty, 36,169 instruction-following and 7,219 truthfulness;
# HelpSteer2's 2,255, 144, 26, 33 and 636 for its five attributes.
TRAIN_SOURCES = {
  "Reddit": 1_225_988,
  "PKU-SafeRLHF": 10_714,
  "UltraFeedback": 71_826,
  "HelpSteer2": 3_094,
}

# ------------------------------------------------------------------ the schema


def make_features(space: PreferenceSpace) -> tfds.features.FeaturesDict:
  """The stored form of an Example: directions are 0 negative, 1 neutral, 2 positive and 3
  unknown; a record without a profile or description has it empty."""
  text = tfds.features.Text()
  directions = tfds.features.Tensor(shape=(len(space),), dtype=np.uint8)
  return tfds.features.FeaturesDict(
    {
      "id": text,
      "source": text,
      "post": text,
      "chosen": text,
      "rejected": text,
      "directions": directions,
      "comments": tfds.features.Sequence({"post": text, "comment": text, "directions": directions}),
      "pairs": tfds.features.Sequence(
        {"post": text, "chosen": text, "rejected": text, "directions": directions}
      ),
      "description": text,
      "profile": text,
    }
  )


def to_features(example: Example, source: str, space: PreferenceSpace) -> dict:
  """An Example as `make_features` stores it; NaN among directions is unknown."""

  def codes(directions_P):
    if directions_P is None:
      return np.full(len(space), _UNKNOWN, np.uint8)
    return np.nan_to_num(2 * directions_P, nan=_UNKNOWN).astype(np.uint8)

  def item(value):
    return dataclasses.asdict(value) | {"directions": codes(value.directions)}

  return {
    "id": example.id,
    "source": source,
    "post": example.post,
    "chosen": example.chosen,
    "rejected": example.rejected,
    "directions": codes(example.directions),
    "comments": [item(comment) for comment in example.persona.comments],
    "pairs": [item(pair) for pair in example.persona.pairs],
    "description": example.persona.description,
    "profile": example.profile or "",
  }


def from_features(features: dict) -> Example:
  """The Example that `to_features` stored, from what a TFDS data source gives."""

  def directions(codes_P):
    unknown_P = codes_P == _UNKNOWN
    if unknown_P.all():
      return None
    return np.where(unknown_P, np.float32(np.nan), codes_P.astype(np.float32) / 2)

  def items(make, fields, name):
    columns = features[name]
    return tuple(
      make(*(text.decode() for text in texts), directions(codes_P))
      for *texts, codes_P in zip(*(columns[f] for f in fields), columns["directions"], strict=True)
    )

  return Example(
    id=features["id"].decode(),
    post=features["post"].decode(),
    chosen=features["chosen"].decode(),
    rejected=features["rejected"].decode(),
    persona=Persona(
      items(UserComment, ("post", "comment"), "comments"),
      items(ComparedPair, ("post", "chosen", "rejected"), "pairs"),
      features["description"].decode(),
    ),
    directions=directions(features["directions"]),
    profile=features["profile"].decode() or None,
  )


# ------------------------------------------------------------------ the sets


@dataclasses.dataclass(kw_only=True, eq=False)
class AlignXConfig(tfds.core.BuilderConfig):
  """One data set, and what it is a function of besides its source files.

  Attributes:
    space: whose directions its records carry.
    records: of each source as published; empty where that is not known.
    share: of the source's rows, a seeded sample; 1 takes all.
    splits: a benchmark has "test" alone.
    seed: of the sample and of the validation users.
    validation_share: of users, not of records.
    max_characters: a longer text is refused.
    max_history: so are more history items.
  """

  space: PreferenceSpace = dataclasses.field(default_factory=alignx_space)
  records: dict[str, int] = dataclasses.field(default_factory=dict)
  share: float = 1.0
  splits: tuple[str, ...] = ("test",)
  seed: int = 0
  validation_share: float = 0.005
  max_characters: int = 200_000
  max_history: int = 16

  def settings(self) -> dict:
    """The fields that a person sets."""
    names = ("name", "seed", "validation_share", "max_characters", "max_history")
    return {name: getattr(self, name) for name in names}


def _subspace(indices, name: str) -> PreferenceSpace:
  return PreferenceSpace(tuple(alignx_space().dimensions[i] for i in indices), name)


_TRAINING = {"records": TRAIN_SOURCES, "splits": ("train", "validation")}
CONFIGS = (
  AlignXConfig(name="train", description="Four sources, 1,311,622 records.", **_TRAINING),
  AlignXConfig(
    name="train_7_percent",
    description="A seeded sample of `train`: 91,918 records of 1,311,622.",
    share=91_918 / 1_311_622,
    **_TRAINING,
  ),
  AlignXConfig(name="test_ugc", description="Reddit users by their comments."),
  AlignXConfig(name="test_pair", description="Reddit users by the pairs they compared."),
  AlignXConfig(name="test_demo", description="Reddit users by a description."),
  AlignXConfig(name="test_arbitrary", description="Reddit users by a mixture of the three."),
  AlignXConfig(name="test_history16", description="Reddit users by 16 history items."),
  AlignXConfig(name="p_soups", description="P-Soups: opposed wishes for style and substance."),
  AlignXConfig(name="prism", description="PRISM: people of many countries, in their own words."),
  AlignXConfig(
    name="uf_p_4",
    description="UF-P-4: four qualities of UltraFeedback, wanted or not.",
    space=_subspace([44, 42, 41, 43], "uf_p_4"),
  ),
  AlignXConfig(
    name="simulated", description="Simulated users.", splits=("train", "validation", "test")
  ),
)


def get_config(name: str, **settings) -> AlignXConfig:
  """A set's config with other settings.

  Raises:
    ValueError: no set has this name.
  """
  for config in CONFIGS:
    if config.name == name:
      return dataclasses.replace(config, **settings)
  names = ", ".join(config.name for config in CONFIGS)
  raise ValueError(f"No data set {name!r}; set config.name to one of {names}.")


# ------------------------------------------------------------------ from source to records


@dataclasses.dataclass(frozen=True)
class SourceRecord:
  """A good record: where it stood, of which source and split it is, and what it says."""

  row: int
  source: str
  split: str
  example: Example


def read_records(part: Part, config: AlignXConfig) -> Iterator[SourceRecord | Refusal]:
  """Each good record of a part, and a Refusal for each other one.

  A record's source is its field `source`, else the name of its file.
  """
  stem = part.file.rsplit("/", 1)[-1]
  for item in read_part(part, seed=config.seed):
    if isinstance(item, Refusal):
      yield item
      continue
    row, record = item
    where = f"{stem}:{row}"
    try:
      example = parse_record(record, config.space, where)
      _check(example, config)
    except RecordError as error:
      yield Refusal(part.file, row, error.field, error.reason)
      continue
    source = str(record.get("source") or re.split("[.:]", stem)[0])
    yield SourceRecord(row, source, split_of(part, record, example, config), example)


def _check(example: Example, config: AlignXConfig) -> None:
  """Raises RecordError on what the schema allows and nobody could use."""
  items = len(example.persona.history)
  if items > config.max_history:
    reason = f"has {items} items; at most {config.max_history}."
    raise RecordError(example.id, "history", reason)
  if not items and not example.persona.description.strip():
    raise RecordError(example.id, "history", "and description are empty: there is no persona.")
  for field, text in texts(example):
    if len(text) > config.max_characters:
      reason = f"is {len(text)} characters; at most {config.max_characters}."
      raise RecordError(example.id, field, reason)


def texts(example: Example) -> Iterator[tuple[str, str]]:
  """(field, text) of all that an example says."""
  yield from (("prompt", example.post), ("chosen", example.chosen), ("rejected", example.rejected))
  yield "description", example.persona.description
  for i, item in enumerate(example.persona.history):
    for field, value in vars(item).items():
      if field != "directions":
        yield f"history[{i}].{field}", value


def split_of(part: Part, record: dict, example: Example, config: AlignXConfig) -> str:
  """The split that a record is of: one user's records are all of one split.

  The user is the record's `user`; where it has none, as in the published files, whoever has
  the same persona: the same items in any order, and the same description.
  """
  if part.file.startswith(SIMULATED):
    return part.file.removeprefix(SIMULATED)
  if "validation" not in config.splits:
    return config.splits[0]
  persona = example.persona
  user = record.get("user") or (
    sorted(digest(*(v for k, v in vars(i).items() if k != "directions")) for i in persona.history),
    persona.description,
  )
  chance = int.from_bytes(digest(config.seed, user)[:7], "big") / 2**56
  return "validation" if chance < config.validation_share else "train"


def digest(*values) -> bytes:
  """16 bytes that stand for plain values."""
  return hashlib.blake2b(repr(values).encode(), digest_size=16).digest()


def content_digest(example: Example) -> bytes:
  """16 bytes that stand for all that an example says; those of duplicates are equal."""
  labels = [example.directions, *(item.directions for item in example.persona.history)]
  directions = [None if d is None else d.tobytes() for d in labels]
  return digest([text for _, text in texts(example)], example.profile, directions)


def sample_rows(parts: Sequence[Part], config: AlignXConfig) -> list[frozenset[int] | None]:
  """Of each part the rows that belong to the config's sample, None for all of them."""
  if config.share == 1:
    return [None] * len(parts)
  total = sum(part.rows for part in parts)
  drawn = np.random.default_rng(config.seed).permutation(total)[: round(config.share * total)]
  drawn.sort()
  samples, start = [], 0
  for part in parts:
    first, last = np.searchsorted(drawn, [start, start + part.rows])
    samples.append(frozenset((drawn[first:last] - start + part.row).tolist()))
    start += part.rows
  return samples


# ------------------------------------------------------------------ the builder


class AlignX(tfds.core.GeneratorBasedBuilder):
  """Personas, posts and compared responses of AlignX (arXiv 2503.15463)."""

  name = "alignx"
  VERSION = tfds.core.Version("1.0.0")
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Put the published files of a set, parquet or JSON lists, into a folder of the set's name."
  )
  BUILDER_CONFIGS = list(CONFIGS)

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      features=make_features(self.builder_config.space),
      homepage="https://arxiv.org/abs/2503.15463",
    )

  def _split_generators(self, dl_manager):
    folder = dl_manager.manual_dir / self.builder_config.name
    return {split: self._generate_examples(folder, split) for split in self.builder_config.splits}

  def _generate_examples(self, folder, split):
    config = self.builder_config
    parts, refused = [], []
    for file in find_files([f"{folder}/*"]):
      found, damaged = find_parts(file, rows=8192)
      parts += found
      refused += damaged
    seen = set()
    for part, rows in zip(parts, sample_rows(parts, config), strict=True):
      for item in read_records(part, config):
        if rows is not None and item.row not in rows:
          continue
        if isinstance(item, Refusal):
          refused.append(item)
        elif item.split == split and (key := content_digest(item.example)) not in seen:
          seen.add(key)
          yield item.example.id, to_features(item.example, item.source, config.space)
    for refusal in refused:
      logging.warning("%s", refusal)
