"""Runs with a latent user variable: at the start, resumed, split, measured, refused."""

import json

import jax
import numpy as np
import pytest

from alignx_jax.experiments import experiment as experiments
from alignx_jax.experiments import measuring
from alignx_jax.experiments.config_checks import check_sizes
from alignx_jax.training import mesh as meshes
from alignx_jax.training.metrics import read_metrics
from tests.small_records import small_config, small_record

pytestmark = pytest.mark.slow


def _record(i: int) -> dict:
  """A small record of a user who compared pairs too; every eighth did not."""
  made, rng = small_record(i), np.random.default_rng(i)
  words = lambda n: " ".join(rng.choice(["sun", "rain", "tea", "fog", "oak"], n))
  directions = made["Preference Direction"]
  pairs = [
    {"prompt": words(1), "chosen": words(2), "rejected": words(2)}
    | {"Preference Direction": directions}
    for _ in range(2 if i % 8 else 0)
  ]
  return made | {"Pair-wise Comparative Feedback": pairs}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp("records") / "records.json"
  path.write_text(json.dumps([_record(i) for i in range(48)]))
  config = small_config(path)
  config.model.remat = False
  config.objective.name = "vpl"
  config.latent.update(size=3, tokens=2, width=8, kl_weight=0.5)
  config.regions.update(prompt=200, response=32, examples=3, persona=300, parts=12)
  config.train.update(rows=4, steps=4, epochs=3)
  return config


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
  experiment = experiments.load_experiment(config)
  workdir = tmp_path_factory.mktemp("run")
  params = experiments.run_training(experiment, workdir).params
  return experiment, workdir, params, read_metrics(workdir)


def _names(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_a_run_starts_at_log_two_beside_the_divergence_whose_weight_rises(trained):
  experiment, workdir, _, lines = trained
  assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
  assert lines[-1]["loss"] < lines[0]["loss"]
  np.testing.assert_allclose([line["kl_weight"] for line in lines], [0, 0.25, 0.5, 0.5])
  for line in lines:
    assert line["kl"] == pytest.approx(sum(line[f"kl_{z:02}"] for z in range(3)), rel=1e-4)
    assert line["kl"] > 0
  # The reference reads nothing of the user, so it is scored once for all epochs.
  (file,) = (workdir / "reference").glob("*.npz")
  assert np.load(file)["scores"].shape == (len(experiment.train), 2)


def test_all_of_the_latent_variable_and_of_the_model_is_trained(trained):
  experiment, _, params, _ = trained
  before, after = _names(experiment.load_base()), _names(params)
  assert any("'latent'" in name for name in before)
  assert all((before[name] != after[name]).any() for name in before)


def test_resumed_equals_uninterrupted(trained, tmp_path, killed_at):
  experiment, _, params, lines = trained
  with killed_at(3):
    experiments.run_training(experiment, tmp_path)
  resumed = _names(experiments.run_training(experiment, tmp_path).params)
  for name, value in _names(params).items():
    np.testing.assert_array_equal(resumed[name], value)
  for name in ("step", "loss", "kl", "kl_02"):
    assert [line[name] for line in read_metrics(tmp_path)] == [line[name] for line in lines]


def test_parts_and_devices_change_neither_the_update_nor_what_is_drawn(trained, tmp_path):
  experiment, _, _, lines = trained
  config = experiment.config.copy_and_resolve_references()
  config.train.update(accumulation=2, devices=2)
  experiments.run_training(experiments.load_experiment(config), tmp_path)
  split = read_metrics(tmp_path)
  for name in ("loss", "kl", "margin"):
    mine = [[line[name] for line in run] for run in (split, lines)]
    np.testing.assert_allclose(*mine, atol=1e-3)


def test_a_run_is_measured_with_its_controls_and_says_what_z_does(trained, capsys):
  experiment, workdir, params, _ = trained
  restored = experiments.trained_params(experiment, workdir)
  for name, value in _names(restored).items():
    np.testing.assert_array_equal(_names(params)[name], value)
  measuring.measure(experiment, restored, workdir)
  told = capsys.readouterr().out
  rows = json.loads((workdir / "results.json").read_text())
  found = [(r["condition"], r["protocol"]) for r in rows if r["policy"] == "vpl"]
  assert found == [
    ("inferred", "matched"),
    ("inferred", "release"),
    ("shuffled", "matched"),
    ("shuffled", "release"),
    ("none", "matched"),
  ]
  assert all(f"| vpl    | {condition}" in told for condition, _ in found)
  latents = json.loads((workdir / "latent.json").read_text())
  assert [row["dimension"] for row in latents] == [0, 1, 2]
  assert all(row["users"] == len(experiment.test) for row in latents)
  assert "of 3 dimensions are active" in told


def test_conditions_give_the_policy_ones_own_z_anothers_and_none(trained):
  experiment, _, params, _ = trained
  # What a few steps leave small is made large.
  soft = lambda path: "token_ZTD" in jax.tree_util.keystr(path)
  params = jax.tree_util.tree_map_with_path(lambda p, x: x * 30 if soft(p) else x, params)
  scorer = measuring.policy_scorer(experiment, params, None)
  own, other, none = (scorer.score(*key) for key in (("inferred",), ("inferred", True), ("none",)))
  silent = np.array([not example.persona.pairs for example in experiment.test])
  assert silent.any() and not silent.all()
  # Of a user without pairs z is 0, which is no z at all.
  np.testing.assert_allclose(own[silent], none[silent], atol=1e-4)
  for one, another in ((own, none), (own, other)):
    assert (np.abs(one - another)[~silent] > 1e-3).any(axis=1).all()


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("latent.size", 0, "config.latent.size is 0; set it to 1 or more"),
    ("latent.tokens", 0, "config.latent.tokens is 0"),
    ("latent.kl_weight", -1.0, "config.latent.kl_weight is -1.0; set it to 0 or more"),
    ("history.kinds", ("ugc",), "add 'pair'"),
    ("regions.persona", 0, "config.regions.persona is 0"),
    ("regions.layout", "8192", "config.regions.layout is '8192'"),
    ("bridge.alone", True, "config.bridge.alone is of a learned bridge"),
  ],
)
def test_what_cannot_be_is_refused_by_its_field(config, field, value, message):
  changed = config.copy_and_resolve_references()
  changed.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=message):
    check_sizes(changed, meshes.make_mesh(None, jax.devices()[:1]))


def test_a_run_of_another_weight_does_not_go_on_with_it(trained):
  experiment, workdir, _, _ = trained
  config = experiment.config.copy_and_resolve_references()
  config.latent.kl_weight = 0.25
  with pytest.raises(ValueError, match=r"latent\.kl_weight was 0\.5 and is 0\.25"):
    experiments.run_training(experiments.load_experiment(config), workdir)
