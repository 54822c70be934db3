"""AlignX in seqio: tasks, mixtures and metrics for those who train with T5X.

  import seqio
  from alignx_jax.data import tasks

  tasks.configure(data_dir="data", tokenizer="tokenizer.json")
  seqio.get_mixture_or_task("alignx_ica_v1").get_dataset(
    {"inputs": 4096, "targets": 512, "rejected": 512}, split="train", seed=0
  )

`data_dir` holds what alignx_jax.prepare_data wrote, a directory for each set: data/train,
data/p_soups, …. Where Python cannot be run first, ALIGNX_DATA_DIR, ALIGNX_TOKENIZER and
ALIGNX_CHAT say the same.

- alignx_ica_v1, alignx_pba_v1: training; inputs is the context, targets the chosen response.
- alignx_ica_SET_v1, alignx_pba_SET_v1 for each benchmark: two examples a pair, chosen before
  rejected, and the metric alignment_accuracy of a model's scores.
- alignx_ica_mixture_v1, alignx_pba_mixture_v1: the four sources of `train` (each a task of its
  own, alignx_ica_reddit_v1, …), at a temperature.

Imports TensorFlow: nothing on the training path imports this.
"""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from alignx_jax.data.alignx import CONFIGS, TRAIN_SOURCES
from alignx_jax.data.formatting import Formatting, Refused, tokenise
from alignx_jax.data.loader import history_rng
from alignx_jax.data.prepared import PreparedExamples, open_prepared, prepared_space
from alignx_jax.data.rows import Regions
from alignx_jax.data.tokenizers import load_tokenizer
from alignx_jax.personas.persona import HistoryPolicy, sample_history

OBJECTIVES = {"ica": "persona", "pba": "inferred"}
SEQUENCE_LENGTH = {"inputs": 4096, "targets": 512, "rejected": 512}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What all tasks share.

  Attributes:
    tokenizer: as data.tokenizers.load_tokenizer takes it.
    chat, prompt: names of the chat and prompt formats.
    history: what training shows of a persona.
    seed: of the history.
    temperature: of the mixtures: shares ∝ size^(1/temperature).
  """

  data_dir: str = os.environ.get("ALIGNX_DATA_DIR", "data")
  tokenizer: str = os.environ.get("ALIGNX_TOKENIZER", "bytes")
  chat: str = os.environ.get("ALIGNX_CHAT", "chatml")
  prompt: str = "default"
  history: HistoryPolicy = HistoryPolicy("release")
  seed: int = 42
  temperature: float = 1.0


settings = Settings()


def configure(**fields) -> None:
  """Changes the settings of all tasks."""
  global settings
  settings = dataclasses.replace(settings, **fields)
  _tokenizer.cache_clear()
  _split.cache_clear()


@functools.cache
def _tokenizer():
  return load_tokenizer(settings.tokenizer)


class AlignXVocabulary(seqio.Vocabulary):
  """Our tokenizer as a seqio vocabulary. Text that looks like a special token stays text."""

  bos_id = property(lambda self: _tokenizer().bos_id)
  eos_id = property(lambda self: _tokenizer().eos_id)
  unk_id = property(lambda self: None)
  _base_vocab_size = property(lambda self: _tokenizer().vocab_size)

  def _encode(self, s: str) -> list[int]:
    return _tokenizer().encode(s)

  def _decode(self, ids) -> str:
    return _tokenizer().decode([int(i) for i in ids])

  def _encode_tf(self, s):
    def encode(text):  # bytes, or run eagerly a str in an array
      text = np.asarray(text).item()
      text = text.decode("utf-8") if isinstance(text, bytes) else text
      return np.array(_tokenizer().encode(text), np.int32)

    ids = tf.numpy_function(encode, [tf.convert_to_tensor(s, tf.string)], tf.int32)
    ids.set_shape([None])
    return ids

  def _decode_tf(self, ids):
    def decode(array):
      rows = np.atleast_2d(array)
      texts = [self.decode(row) for row in rows]
      return np.array(texts if array.ndim > 1 else texts[0], object)

    return tf.numpy_function(decode, [tf.convert_to_tensor(ids, tf.int32)], tf.string)

  def __eq__(self, other):
    return isinstance(other, AlignXVocabulary)

  __hash__ = seqio.Vocabulary.__hash__


# ------------------------------------------------------------------ from records to ids


@functools.cache
def _split(name: str, split: str, source: str | None) -> PreparedExamples:
  """A split of a set, or of one of its sources."""
  examples = open_prepared(f"{settings.data_dir}/{name}")[split]
  if source is None:
    return examples
  return dataclasses.replace(examples, indices=examples.by_source().get(source, range(0)))


class _Source(seqio.FunctionDataSource):
  """Indices of a split's examples; what they say is read by the preprocessor."""

  def __init__(self, name: str, splits: Sequence[str], source: str | None):
    self._name, self._source = name, source

    def dataset(split, shuffle_files, seed=None):
      indices = tf.data.Dataset.range(len(_split(name, split, source)))
      if shuffle_files:
        indices = indices.shuffle(max(1, len(_split(name, split, source))), seed=seed)
      return indices.map(lambda index: {"index": index, "split": split})

    super().__init__(dataset, splits)

  def num_input_examples(self, split: str) -> int:
    return len(_split(self._name, split, self._source))


def format_example(
  examples: PreparedExamples, index: int, *, condition: str, regions: Regions, history
) -> tuple[list[int], list[int], list[int]] | None:
  """Ids of context, chosen and rejected, as the Grain loader has them in its first epoch.

  Returns:
    None where the example is refused; `refused` counts why.
  """
  example = examples[index]
  formatting = Formatting(
    tokenizer=_tokenizer(),
    space=prepared_space(examples.directory),
    regions=regions,
    chat=settings.chat,
    prompt=settings.prompt,
    condition=condition,
    history=history,
  )
  persona = sample_history(example.persona, history, history_rng(settings.seed, 0, example.id))
  try:
    ids = tokenise(example, formatting, persona)
  except Refused as reason:
    if not refused[str(reason)]:
      logging.warning("refused %s and perhaps others: %s", example.id, reason)
    refused[str(reason)] += 1
    return None
  return ids.context, ids.chosen, ids.rejected


refused: Counter = Counter()


def _tokenise(dataset, *, sequence_length, output_features, name, source, condition, pairs):
  """Preprocessor: from an index to ids.

  Args:
    pairs: give chosen and rejected as two examples, of the whole persona, for a benchmark.
  """
  del output_features
  lengths = SEQUENCE_LENGTH | dict(sequence_length or {})
  # The last token of the context moves to the responses in a packed row, here it stays.
  regions = Regions(lengths["inputs"] - 1, min(lengths["targets"], lengths["rejected"]), 1)
  history = HistoryPolicy() if pairs else settings.history

  def ids_of(index, split):
    examples = _split(name, split.decode(), source)
    found = format_example(
      examples, int(index), condition=condition, regions=regions, history=history
    )
    return [np.array(ids, np.int32) for ids in found or ([], [], [])]

  def to_ids(item):
    parts = tf.numpy_function(ids_of, [item["index"], item["split"]], [tf.int32] * 3)
    for part in parts:
      part.set_shape([None])
    return {"index": item["index"]} | dict(zip(SEQUENCE_LENGTH, parts, strict=True))

  def two(item):
    inputs, index = item["inputs"], item["index"]
    branches = [
      {"inputs": inputs, "targets": item[part], "index": index, "branch": branch}
      for branch, part in enumerate(("targets", "rejected"))
    ]
    sets = [
      tf.data.Dataset.from_tensors({k: tf.convert_to_tensor(v) for k, v in branch.items()})
      for branch in branches
    ]
    return sets[0].concatenate(sets[1])

  dataset = dataset.map(to_ids, num_parallel_calls=tf.data.AUTOTUNE)
  dataset = dataset.filter(lambda item: tf.size(item["targets"]) > 0)
  return dataset.flat_map(two) if pairs else dataset


# ------------------------------------------------------------------ metrics


def _postprocess(output, *, example=None, is_target=False):
  """Which branch of which pair a target is."""
  if is_target:
    return {"index": int(example["index"]), "branch": int(example["branch"])}
  return output


def alignment_accuracy(
  targets: Sequence[Mapping[str, int]], scores, reference_scores=None
) -> dict[str, float]:
  """Share of pairs whose chosen response scores higher, strictly: alignment accuracy.

  Args:
    targets: of each example its pair and branch, as the benchmark tasks give them.
    scores: log-likelihood of each example's targets under the policy, in nats; of a tuple the
      first.
    reference_scores: the same under the reference, to be subtracted; without, what is
      compared is the likelihood itself.
  Returns:
    alignment_accuracy and pairs.
  Raises:
    ValueError: a pair has not exactly one chosen and one rejected response.
  """
  scores = np.asarray(scores[0] if isinstance(scores, tuple) else scores, np.float64)
  if reference_scores is not None:
    scores = scores - np.asarray(reference_scores, np.float64)
  pairs = {}
  for target, score in zip(targets, scores, strict=True):
    pairs.setdefault(target["index"], {})[target["branch"]] = score
  if any(set(pair) != {0, 1} for pair in pairs.values()) or 2 * len(pairs) != len(scores):
    raise ValueError("Each pair needs the score of its chosen and of its rejected response, once.")
  right = [pair[0] > pair[1] for pair in pairs.values()]
  return {"alignment_accuracy": float(np.mean(right)), "pairs": len(right)}


def _metric(targets, scores):
  return alignment_accuracy(targets, scores)


# ------------------------------------------------------------------ registration


def _feature():
  return seqio.Feature(vocabulary=AlignXVocabulary(), add_eos=False, dtype=tf.int32)


def _add(task, name, splits, objective, *, source=None, pairs=False):
  features = SEQUENCE_LENGTH if not pairs else ("inputs", "targets")
  seqio.TaskRegistry.add(
    task,
    source=_Source(name, splits, source),
    preprocessors=[
      functools.partial(
        _tokenise, name=name, source=source, condition=OBJECTIVES[objective], pairs=pairs
      )
    ],
    output_features={feature: _feature() for feature in features},
    postprocess_fn=_postprocess if pairs else None,
    metric_fns=[_metric] if pairs else [],
    shuffle_buffer_size=None if pairs else seqio.SHUFFLE_BUFFER_SIZE,
  )


def _rate(task: seqio.Task) -> float:
  return task.source.num_input_examples("train") ** (1 / settings.temperature)


def _register():
  for objective in OBJECTIVES:
    _add(f"alignx_{objective}_v1", "train", ("train", "validation"), objective)
    parts = {s: f"alignx_{objective}_{s.lower().replace('-', '_')}_v1" for s in TRAIN_SOURCES}
    for source, task in parts.items():
      _add(task, "train", ("train", "validation"), objective, source=source)
    seqio.MixtureRegistry.add(
      f"alignx_{objective}_mixture_v1", [(task, _rate) for task in parts.values()]
    )
    for config in CONFIGS:
      if config.splits == ("test",):
        _add(f"alignx_{objective}_{config.name}_v1", config.name, ("test",), objective, pairs=True)


_register()
