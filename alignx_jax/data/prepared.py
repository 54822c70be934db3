"""What prepare_data.py wrote, as examples: read on demand, without TensorFlow."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from alignx_jax.data.records import Example
from alignx_jax.personas.preferences import PreferenceSpace


def is_prepared(path: str) -> bool:
  """Whether this is the directory of a prepared set."""
  return (Path(path) / "data_card.json").is_file()


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedExamples(Sequence):
  """A split of a prepared set. Picklable: each process opens the shards for itself.

  Attributes:
    indices: of the split's records, those that these are.
  """

  directory: str
  split: str
  indices: np.ndarray | range

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return dataclasses.replace(self, indices=self.indices[index])
    from alignx_jax.data.alignx import from_features

    place = int(self.indices[index])
    try:
      features = self._records[place]
    except Exception as error:  # whatever the library makes of a shard that is gone or damaged
      raise OSError(
        f"Record {place} of the split {self.split!r} in {self.directory} cannot be read ({error}): "
        "restore that file, or prepare the set anew in another directory."
      ) from error
    return from_features(features)

  def __iter__(self) -> Iterator[Example]:
    return (self[i] for i in range(len(self)))

  def __getstate__(self):
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

  def __setstate__(self, state):
    self.__dict__.update(state)

  @functools.cached_property
  def _records(self):
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(self.directory).as_data_source(self.split)

  @property
  def fingerprint(self) -> str:
    """Stands for what these examples say."""
    card = json.loads((Path(self.directory) / "data_card.json").read_text(encoding="utf-8"))
    return f"{card['fingerprint']} {self.split} {self.indices!r}"

  def by_source(self) -> dict[str, np.ndarray]:
    """Indices of the examples of each source."""
    with np.load(Path(self.directory) / "index.npz", allow_pickle=False) as index:
      names, codes = index["source_names"], index[f"{self.split}_source"][self.indices]
    found = {str(name): np.flatnonzero(codes == i) for i, name in enumerate(names)}
    return {name: indices for name, indices in found.items() if len(indices)}


def open_prepared(directory: str) -> dict[str, PreparedExamples]:
  """{split: its examples} of a prepared set.

  Raises:
    FileNotFoundError: there is none, or a shard of it is missing.
  """
  path = Path(directory)
  if not is_prepared(directory):
    raise FileNotFoundError(
      f"{directory} holds no prepared data set (no data_card.json): run "
      f"python -m alignx_jax.prepare_data with --workdir={directory}; it goes on where it stopped."
    )
  card = json.loads((path / "data_card.json").read_text(encoding="utf-8"))
  return {
    split: PreparedExamples(str(path), split, range(count))
    for split, count in card["splits"].items()
  }


def prepared_space(directory: str) -> PreferenceSpace:
  """The dimensions of a prepared set's directions."""
  from alignx_jax.data.alignx import get_config

  card = json.loads((Path(directory) / "data_card.json").read_text(encoding="utf-8"))
  return get_config(card["name"]).space
