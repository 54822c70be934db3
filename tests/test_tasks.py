"""seqio gives what Grain gives: the same example, the same ids; rates, metrics and names."""

import json
import subprocess
import sys

import numpy as np
import pytest
import seqio

from alignx_jax.data import tasks
from alignx_jax.data.alignx import TRAIN_SOURCES, get_config
from alignx_jax.data.formatting import Formatting
from alignx_jax.data.loader import Loader
from alignx_jax.data.prepared import open_prepared
from alignx_jax.data.preparing import prepare
from alignx_jax.data.rows import Regions
from alignx_jax.data.stream import mixing_rates
from alignx_jax.data.tokenizers import load_tokenizer
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.personas.preferences import alignx_space
from alignx_jax.personas.simulator import simulate_record

LENGTHS = {"inputs": 900, "targets": 400, "rejected": 400}
SIZES = dict(zip(TRAIN_SOURCES, (24, 6, 4, 2), strict=True))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp("data")
  values = []
  for source, size in SIZES.items():
    start = len(values)
    values += [
      simulate_record(i, split="train", seed=5) | {"source": source}
      for i in range(start, start + size)
    ]
  for i, value in enumerate(values):
    value["chosen"] += " <|im_end|> stays text" * (i % 5 == 0)
  values[7]["chosen"] = "far too long " * 100
  path = directory / "records.json"
  path.write_text(json.dumps(values), encoding="utf-8")
  train = get_config("train", validation_share=0.0)
  prepare([str(path)], directory / "train", train, shard_records=100)
  prepare([str(path)], directory / "test_pair", get_config("test_pair"), shard_records=100)
  old = tasks.settings
  tasks.configure(data_dir=str(directory), tokenizer="bytes")
  yield directory
  tasks.configure(**vars(old))


def dataset(name, split="train", **options):
  task = seqio.get_mixture_or_task(name)
  options = {"shuffle": False, "seed": 0} | options
  return list(task.get_dataset(LENGTHS, split=split, **options).as_numpy_iterator())


@pytest.mark.parametrize(("objective", "condition"), [("ica", "persona"), ("pba", "inferred")])
def test_the_ids_are_those_of_the_grain_loader(data_dir, objective, condition):
  formatting = Formatting(
    tokenizer=load_tokenizer("bytes"),
    space=alignx_space(),
    regions=Regions(LENGTHS["inputs"] - 1, LENGTHS["targets"], 1),
    chat="chatml",
    prompt="default",
    condition=condition,
    history=HistoryPolicy("release"),
  )
  examples = open_prepared(str(data_dir / "train"))["train"]
  loader = Loader(examples, formatting, rows=1, seed=tasks.settings.seed)
  expected = {}
  for rows, _ in loader.batches():
    if rows.example_BE[0, 0] < 0:
      continue
    C, R = formatting.regions.context, formatting.regions.response
    segments_L, tokens_L = rows.segments_BL[0], rows.tokens_BL[0]
    context = tokens_L[:C][segments_L[:C] == 1].tolist()
    last = int(tokens_L[C])
    targets = [rows.targets_BNR[0, n][segments_L[C + n * R :][:R] == 1].tolist() for n in (0, 1)]
    expected[loader.stream.example(int(rows.example_BE[0, 0]))] = ([*context, last], *targets)
  found = {
    int(item["index"]): tuple(item[k].tolist() for k in LENGTHS)
    for item in dataset(f"alignx_{objective}_v1")
  }
  assert found == expected
  assert 7 not in found and len(found) == 35  # one is refused, and counted
  assert tasks.refused["response longer than its region"] >= 1


def test_a_mixture_takes_the_sources_at_their_rates(data_dir):
  parts = [f"alignx_ica_{s}_v1" for s in ("reddit", "pku_saferlhf", "ultrafeedback", "helpsteer2")]
  part_of = {tuple(item["inputs"]): part for part in parts for item in dataset(part)}
  tasks.configure(temperature=2.0)
  try:
    mixture = seqio.get_mixture_or_task("alignx_ica_mixture_v1")
    rate_of = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    endless = mixture.get_dataset(LENGTHS, split="train", shuffle=False, seed=1, num_epochs=None)
    drawn = [part_of[tuple(i["inputs"])] for i in endless.take(400).as_numpy_iterator()]
  finally:
    tasks.configure(temperature=1.0)
  assert set(rate_of) == set(parts)
  rates = mixing_rates(list(SIZES.values()), 2.0)
  total = sum(rate_of.values())
  np.testing.assert_allclose([rate_of[part] / total for part in parts], rates, rtol=1e-6)
  # Four standard deviations of 400 draws.
  np.testing.assert_allclose([drawn.count(part) / 400 for part in parts], rates, atol=0.1)


def test_a_source_has_its_own_records_alone(data_dir):
  items = dataset("alignx_ica_ultrafeedback_v1")
  assert len(items) == SIZES["UltraFeedback"]
  whole = dataset("alignx_ica_v1")
  assert {tuple(i["inputs"]) for i in items} <= {tuple(i["inputs"]) for i in whole}


def test_shuffling_loses_and_repeats_nothing(data_dir):
  shuffled = dataset("alignx_pba_v1", shuffle=True, seed=3)
  assert sorted(int(i["index"]) for i in shuffled) == [i for i in range(36) if i != 7]
  assert [int(i["index"]) for i in shuffled] != sorted(int(i["index"]) for i in shuffled)


def test_a_benchmark_gives_pairs_and_their_accuracy(data_dir):
  items = dataset("alignx_ica_test_pair_v1", split="test")
  assert [int(i["branch"]) for i in items] == [0, 1] * 35
  task = seqio.get_mixture_or_task("alignx_ica_test_pair_v1")
  targets = [task.postprocess_fn(None, example=item, is_target=True) for item in items]
  (metric,) = task.metric_fns
  right = [1.0, 0.0] * 20 + [0.0, 1.0] * 10 + [2.0, 2.0] * 5  # a draw is not right
  assert metric(targets, right) == {"alignment_accuracy": 20 / 35, "pairs": 35}
  reference = [0.0, 1.0] * 35
  assert tasks.alignment_accuracy(targets, [0.0] * 70, reference)["alignment_accuracy"] == 1.0
  with pytest.raises(ValueError, match="its chosen and of its rejected"):
    metric(targets[:-1], right[:-1])


def test_the_vocabulary_is_the_tokenizers(data_dir):
  vocabulary = seqio.get_mixture_or_task("alignx_ica_v1").output_features["inputs"].vocabulary
  tokenizer = load_tokenizer("bytes")
  text = "Grüße <|im_end|> 🎈"
  assert vocabulary.encode(text) == tokenizer.encode(text)
  assert vocabulary.decode(tokenizer.encode(text)) == text
  assert vocabulary.encode_tf(text).numpy().tolist() == tokenizer.encode(text)
  assert vocabulary.decode_tf(vocabulary.encode_tf(text)).numpy().decode() == text
  assert (vocabulary.vocab_size, vocabulary.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)


def test_the_training_path_imports_no_tensorflow():
  code = (
    "import sys, alignx_jax.train, alignx_jax.experiments.experiment, alignx_jax.data.preparing\n"
    "import alignx_jax.data.prepared, alignx_jax.data.alignx\n"
    "assert not {'tensorflow', 'seqio'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
