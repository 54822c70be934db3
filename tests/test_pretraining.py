"""Pre-training of the study's base: its data, its loss, and resuming."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from alignx_jax import pretrain_base
from alignx_jax.data.tokenizers import load_tokenizer
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import PRESETS
from alignx_jax.objectives.log_probs import token_log_probs
from alignx_jax.training import pretraining
from alignx_jax.training.metrics import read_metrics
from configs import study_simulated


def test_repeats_can_be_known_after_one_period():
  ids_BL, segments_BL = pretraining.repeats(
    np.random.default_rng(0), rows=50, length=64, vocab_size=1000
  )
  assert (segments_BL == 1).all()
  for row_L in ids_BL:
    periods = [p for p in range(1, 33) if (row_L[p:] == row_L[:-p]).all()]
    assert periods and min(periods) >= 4


def test_documents_fill_their_rows_and_are_told_apart():
  tokenizer = load_tokenizer("bytes")
  ids_BL, segments_BL = pretraining.documents(
    np.random.default_rng(0), tokenizer, rows=3, length=3000, seed=0
  )
  assert segments_BL.min() == 1
  for ids_L, segments_L in zip(ids_BL, segments_BL, strict=True):
    ends = np.flatnonzero(np.diff(segments_L))
    assert len(ends) and (np.diff(segments_L)[ends] == 1).all()
    assert {tokenizer.decode(ids_L[end : end + 1]) for end in ends} <= {">", "<|im_end|>"}


def test_a_documents_loss_is_that_of_the_document_alone():
  model = Decoder(PRESETS["tiny"], rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  documents = [rng.integers(300, size=n) for n in (9, 14, 5)]
  expected = 0.0
  for ids in documents:
    hidden = model(ids[None], np.arange(len(ids))[None], np.ones((1, len(ids)), np.int32))
    expected -= token_log_probs(hidden[:, :-1], model.head, ids[None, 1:]).sum()
  segments = np.repeat([1, 2, 3], [9, 14, 5])[None]
  nats, tokens = pretraining.next_token_loss(
    model, jnp.asarray(np.concatenate(documents)[None]), jnp.asarray(segments)
  )
  assert tokens == 8 + 13 + 4
  assert nats == pytest.approx(float(expected), rel=1e-5)


@pytest.fixture
def config():
  study = study_simulated.get_config()
  study.data.update(train_records=2, test_records=2)
  study.regions.update(context=2048, response=256, examples=2)
  study.train.devices = 1
  study.eval.rows = 1
  phases = (
    ConfigDict({"steps": 4, "rows": 2, "length": 32, "repeats": 1.0}),
    ConfigDict({"steps": 4, "rows": 1, "length": 64, "repeats": 0.5}),
  )
  return ConfigDict(
    {
      "seed": 0,
      "preset": "tiny",
      "tokenizer": {"vocab_size": 300, "documents": 30},
      "phases": phases,
      "muon_learning_rate": 0.02,
      "adam_learning_rate": 3e-3,
      "warmup": 2,
      "log_every": 1,
      "checkpoint_every": 2,
      "study": study,
    }
  )


@pytest.mark.slow
def test_resumed_equals_uninterrupted(config, tmp_path, killed_at):
  whole = pretraining.pretrain(config, tmp_path / "whole")

  with killed_at(5):
    pretraining.pretrain(config, tmp_path / "cut")
  resumed = pretraining.pretrain(config, tmp_path / "cut")
  losses = [[x["loss"] for x in read_metrics(tmp_path / name)] for name in ("whole", "cut")]
  assert losses[0] == losses[1] and len(losses[0]) == 8
  assert losses[0][3] < losses[0][0]
  ours, theirs = ((d / "model.safetensors").read_bytes() for d in (whole, resumed))
  assert ours == theirs


@pytest.mark.slow
def test_the_command_makes_a_base_and_measures_it(config, tmp_path, capsys):
  pretrain_base.main(config, tmp_path)
  printed = capsys.readouterr().out
  for condition in ("length", "persona", "inferred", "golden"):
    assert f" {condition} " in printed
