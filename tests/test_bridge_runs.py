"""Properties of runs with a learned bridge: resumed, split, unlabelled, frozen, in other spaces."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from alignx_jax.data.loader import Loader
from alignx_jax.evaluation.accuracy import others
from alignx_jax.evaluation.calibration import fit_temperature, softmax
from alignx_jax.experiments import bridges, loading, measuring
from alignx_jax.experiments import experiment as experiments
from alignx_jax.experiments.benchmarks import load_subject, run_benchmarks
from alignx_jax.models.bridge import TABLES
from alignx_jax.models.lora import without_lora
from alignx_jax.personas.distribution import Preferences
from alignx_jax.personas.preferences import Dimension, PreferenceSpace
from alignx_jax.preference_model import (
  PreferenceModel,
  infer_preferences,
  load_preference_model,
  score_responses,
)
from alignx_jax.training.metrics import read_metrics
from alignx_jax.training.reference import fingerprint
from configs import base
from tests.small_records import small_record


def _dimension(topic: str) -> Dimension:
  return Dimension("topics", f"Likes {topic}", f"Dislikes {topic}")


TEA, RAIN, SUN, FOG, OAK, HUMOR, MUSIC = map(
  _dimension, ("tea", "rain", "sun", "fog", "oak", "humor", "music")
)

pytestmark = pytest.mark.slow
MIST = Dimension("topics", "Enjoys mist", "Avoids mist", formerly=FOG.negative)
OLD = PreferenceSpace((TEA, RAIN, SUN, FOG, OAK, HUMOR), "old")
# Without the sun; the fog is renamed, music is new, and nothing stands where it stood.
NEW = PreferenceSpace((RAIN, MIST, MUSIC, TEA, HUMOR, OAK), "new")
KEPT_NEW, KEPT_OLD, ADDED = [0, 1, 3, 4, 5], [1, 3, 0, 5, 4], 2
RECORDS = 48
# Labels count a thousand times, whichever direction they are.
HEAVY = {"bridge.label_weight": 1e3, "bridge.balance": 0.0}


class Run(NamedTuple):
  """A run of two or more steps.

  Attributes:
    before: parameters that it began with.
    lines: of metrics.jsonl.
  """

  experiment: experiments.Experiment
  workdir: Path
  before: nnx.State
  params: nnx.State
  lines: list[dict]


def _config(directory: Path, fields=(), *, space=OLD, labelled=lambda i: True):
  """A config of records that it writes to a directory.

  Args:
    fields: by full name, what differs from the others here.
    space: that the records are labelled in.
    labelled: which records have labels.
  """

  def record(i):
    made, rng = small_record(i), np.random.default_rng(i)
    made["User-Generated Content"] = [dict(act) for act in made["User-Generated Content"]]
    for part in (made, *made["User-Generated Content"]):
      directions = rng.choice([0, 0.5, 1], len(space)).tolist()
      part["Preference Direction"] = directions if labelled(i) else None
    return made

  directory.mkdir(parents=True, exist_ok=True)
  (directory / "records.json").write_text(json.dumps([record(i) for i in range(RECORDS)]))
  (directory / "space.json").write_text(space.to_json())
  config = base.get_config()
  config.model.weights = "preset:tiny"
  config.model.remat = False
  config.data.path = str(directory / "records.json")
  config.data.space = str(directory / "space.json")
  config.objective.name = "pba"
  config.bridge.kind = "head"
  config.bridge.size = 16
  config.bridge.forcing = (0.75, 0.25)
  config.regions.update(context=512, prompt=200, response=32, examples=3, persona=400, parts=16)
  config.optimizer.learning_rate = 1e-2
  config.train.update(rows=2, steps=2, epochs=2, checkpoint_every=2, devices=1)
  config.eval.rows = 2
  config.update_from_flattened_dict(dict(fields))
  return config


def _run(config, workdir: Path) -> Run:
  experiment = experiments.load_experiment(config)
  before = jax.device_get(experiment.load_base())
  params = experiments.run_training(experiment, workdir).params
  return Run(experiment, workdir, before, params, read_metrics(workdir))


def _copy(run: Run, fields=()):
  """The config of a run with other fields."""
  config = run.experiment.config.copy_and_resolve_references()
  config.update_from_flattened_dict(dict(fields))
  return config


def _named(params) -> dict[str, np.ndarray]:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _changed(before, after) -> set[str]:
  """Names of the parameters that are not the same to the bit."""
  before, after = _named(before), _named(after)
  assert before.keys() == after.keys()
  return {name for name in before if not np.array_equal(before[name], after[name])}


def _table(params, name: str) -> np.ndarray:
  return np.asarray(params["bridge"][name][...])


def _column(run: Run, name: str) -> list[float]:
  return [line[name] for line in run.lines]


def _results(workdir: Path, *keys: str) -> list[tuple]:
  rows = json.loads((workdir / "results.json").read_text())
  return [tuple(row[key] for key in keys) for row in rows]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(directory) -> Run:
  """All weights and the bridge, of labelled records in the old space."""
  fields = {"train.rows": 4, "train.steps": 5, "train.epochs": 3}
  config = _config(directory / "old", fields)
  return _run(config, directory / "trained")


@pytest.fixture(scope="module")
def measured(trained) -> Run:
  """The same, evaluated; its temperature is that of some users of the test split."""
  experiment = dataclasses.replace(trained.experiment, validation=trained.experiment.test[::2])
  measuring.measure(experiment, trained.params, trained.workdir)
  return trained._replace(experiment=experiment)


@pytest.fixture(scope="module")
def adapted(directory) -> Run:
  """An adapter and the bridge beside a frozen base."""
  config = _config(directory / "old", {"lora.rank": 2, "reference.kind": "online"})
  return _run(config, directory / "adapted")


@pytest.fixture(scope="module")
def new_space(directory) -> dict:
  """The fields with which a run goes on from another in the new space, where it differs."""
  config = _config(directory / "new", space=NEW)
  return {
    "data.path": config.data.path,
    "data.space": config.data.space,
    "bridge.space": config.data.space,
  }


@pytest.fixture(scope="module")
def extended(trained, new_space, directory) -> Run:
  """The new dimension alone, from the trained run; weights that are trained would decay."""
  fields = {
    **new_space,
    "bridge.start": str(trained.workdir),
    "bridge.alone": True,
    "bridge.new_only": True,
    "optimizer.weight_decay": 0.1,
    "train.steps": 2,
  }
  return _run(_copy(trained, fields), directory / "extended")


@pytest.fixture(scope="module")
def relabelled(trained, new_space, directory) -> Run:
  """The bridge alone, from the trained run to the new space, of records that are in the old."""
  fields = {
    "bridge.space": new_space["bridge.space"],
    "bridge.start": str(trained.workdir),
    "bridge.alone": True,
    "bridge.dpo_gradient": False,
    "train.steps": 2,
  }
  return _run(_copy(trained, fields), directory / "relabelled")


# ------------------------------------------------------------------ the same run otherwise


def test_resumed_equals_uninterrupted(trained, tmp_path, killed_at):
  with killed_at(3):
    experiments.run_training(trained.experiment, tmp_path)
  assert _column(trained._replace(lines=read_metrics(tmp_path)), "step") == [0, 1, 2]
  resumed = experiments.run_training(trained.experiment, tmp_path)
  assert not _changed(trained.params, resumed.params)
  lines = read_metrics(tmp_path)
  for name in ("step", "loss", "label_loss", "act_loss", "forced", "gradient_norm"):
    assert [line[name] for line in lines] == _column(trained, name)


def test_parts_and_devices_change_neither_the_update_nor_who_is_taught(trained, tmp_path):
  split = _run(_copy(trained, {"train.accumulation": 2, "train.devices": 2}), tmp_path)
  for name in ("loss", "label_loss", "act_loss"):
    np.testing.assert_allclose(_column(split, name), _column(trained, name), atol=1e-4)
  assert _column(split, "forced") == _column(trained, "forced")
  assert 0 < np.mean(_column(split, "forced")) < 1
  norms = _column(split, "gradient_norm"), _column(trained, "gradient_norm")
  np.testing.assert_allclose(norms[0][0], norms[1][0], rtol=1e-5)
  np.testing.assert_allclose(*norms, rtol=1e-3)  # of models that are no longer quite the same


# ------------------------------------------------------------------ labels


@pytest.fixture(scope="module")
def unlabelled(directory) -> Run:
  """Of records without labels, evaluated."""
  config = _config(directory / "unlabelled", HEAVY, labelled=lambda i: False)
  run = _run(config, directory / "of_unlabelled")
  measuring.measure(run.experiment, run.params, run.workdir)
  return run


@pytest.fixture(scope="module")
def mixed(directory) -> Run:
  """Of records of which every third has labels, evaluated."""
  config = _config(directory / "mixed", HEAVY, labelled=lambda i: i % 3 == 0)
  run = _run(config, directory / "of_mixed")
  measuring.measure(run.experiment, run.params, run.workdir)
  return run


def test_records_without_labels_train_without_the_label_term(unlabelled, mixed):
  for run in (unlabelled, mixed):
    for name in ("loss", "gradient_norm"):
      assert np.isfinite(_column(run, name)).all()
  assert unlabelled.lines[-1]["loss"] < unlabelled.lines[0]["loss"]
  for name in ("label_loss", "act_loss", "label_probability"):
    assert np.isnan(_column(unlabelled, name)).all()
    assert np.isfinite(_column(mixed, name)).any()
  assert not any(_column(unlabelled, "forced"))
  assert 0 < max(_column(mixed, "forced")) < 1
  # The least part of so heavy a term would be seen.
  assert max(_column(unlabelled, "gradient_norm")) < 100 < max(_column(mixed, "gradient_norm"))


def test_records_without_labels_are_evaluated_but_for_what_needs_them(unlabelled):
  conditions = _results(unlabelled.workdir, "policy", "condition")
  assert ("pba_head", "inferred") in conditions and ("pba_head", "shuffled") in conditions
  assert "golden" not in {condition for _, condition in conditions}
  experiment = unlabelled.experiment
  inferred_XPK = bridges.inferred_logits(experiment, unlabelled.params, experiment.test)
  assert bridges.preference_rows(experiment, softmax(inferred_XPK)) == []
  assert not (unlabelled.workdir / "preferences.json").exists()
  # There is nothing to fit a temperature on.
  assert bridges.temperature_of(experiment, unlabelled.params, unlabelled.workdir) == 1
  assert not (unlabelled.workdir / bridges.CALIBRATION).exists()


def test_of_a_mixture_every_labelled_record_is_measured_by_its_labels(mixed):
  test = mixed.experiment.test
  labelled = sum(example.directions is not None for example in test)
  assert 0 < labelled < len(test)
  rows = _results(mixed.workdir, "policy", "condition", "protocol", "examples", "refused")
  assert ("pba_head", "inferred", "matched", len(test), 0) in rows
  for protocol in ("matched", "release"):
    assert ("pba_head", "golden", protocol, labelled, len(test) - labelled) in rows
  preferences = json.loads((mixed.workdir / "preferences.json").read_text())
  assert {row["users"] for row in preferences} == {labelled}


# ------------------------------------------------------------------ what is trained


def test_a_bridge_alone_is_all_that_is_trained(relabelled):
  changed = _changed(relabelled.before, relabelled.params)
  assert all("'bridge'" in name for name in changed)
  for shared in ("query_DA", "key_DA", "out_QVK", *TABLES):
    assert any(shared in name for name in changed)


def test_beside_an_adapter_the_base_is_not_trained(adapted):
  changed = _changed(adapted.before, adapted.params)
  factors = {name for name in changed if "_lora_" in name}
  assert len(factors) == 14  # of seven projections
  assert changed > factors and all("'bridge'" in name for name in changed - factors)


@pytest.mark.parametrize("name", ["adapted", "extended"])
def test_what_was_frozen_comes_back_beside_what_was_trained(name, trained, request):
  run = request.getfixturevalue(name)
  assert not _changed(run.params, experiments.trained_params(run.experiment, run.workdir))
  as_start = trained.experiment.of_run(str(run.workdir))
  assert not _changed(run.params, experiments.restored_params(as_start))


def test_a_notebook_gets_the_parameters_of_what_a_run_went_on_from(extended):
  loaded = load_preference_model(extended.workdir)
  assert loaded.space == NEW and not _changed(extended.params, loaded.params)


# ------------------------------------------------------------------ another space


def test_what_was_learnt_of_a_dimension_goes_along_whatever_its_name_and_place(trained, extended):
  for table in TABLES:
    np.testing.assert_array_equal(
      _table(extended.before, table)[KEPT_NEW], _table(trained.params, table)[KEPT_OLD]
    )
  named = _named(extended.before), _named(trained.params)
  for name in named[0]:
    if not any(table in name for table in TABLES):
      np.testing.assert_array_equal(*(params[name] for params in named))
  mesh_params = extended.experiment.load_base()
  inferred = bridges.inferred_logits(extended.experiment, mesh_params, extended.experiment.test)
  was = bridges.inferred_logits(trained.experiment, trained.params, trained.experiment.test)
  assert [e.post for e in extended.experiment.test] == [e.post for e in trained.experiment.test]
  np.testing.assert_array_equal(softmax(inferred)[:, KEPT_NEW], softmax(was)[:, KEPT_OLD])
  preferences = np.random.default_rng(0).dirichlet([1, 1, 1], len(OLD)).astype(np.float32)
  permuted = np.full_like(preferences, 1 / 3)
  permuted[KEPT_NEW] = preferences[KEPT_OLD]
  tokens = lambda run, params, given: np.asarray(
    nnx.merge(nnx.graphdef(run.experiment.model), params).bridge.tokens(given)
  )
  np.testing.assert_array_equal(
    tokens(extended, mesh_params, permuted)[KEPT_NEW],
    tokens(trained, trained.params, preferences)[KEPT_OLD],
  )


@pytest.mark.parametrize("name", ["adapted", "trained"])
def test_a_new_dimension_starts_from_its_phrases(name, new_space, request):
  run = request.getfixturevalue(name)
  fields = {**new_space, "bridge.start": str(run.workdir)}
  experiment = experiments.load_experiment(_copy(run, fields))
  started = experiment.load_base()
  embedding_VD = np.asarray(run.params["embedding_VD"][...])  # as the run trained them
  encode = experiment.formatting.tokenizer.encode
  for k, pole in ((0, MUSIC.negative), (2, MUSIC.positive)):
    by_hand = embedding_VD[encode(pole)].mean(axis=0)
    np.testing.assert_allclose(_table(started, "token_PKD")[ADDED, k], by_hand, atol=1e-6)
    np.testing.assert_allclose(_table(started, "pole_PQD")[ADDED, k // 2], by_hand, atol=1e-6)
  assert not _table(started, "token_PKD")[ADDED, 1].any()
  np.testing.assert_allclose(np.exp(_table(started, "bias_PK")[ADDED]).sum(), 1, rtol=1e-5)


def test_of_new_dimensions_alone_nothing_else_moves(extended):
  for name in _changed(extended.before, extended.params):
    assert any(f"'{table}'" in name for table in TABLES)
  for table in TABLES:
    before, after = (_table(params, table) for params in (extended.before, extended.params))
    np.testing.assert_array_equal(before[KEPT_NEW], after[KEPT_NEW])
    assert (before[ADDED] != after[ADDED]).any()


def test_of_a_dimension_that_no_record_is_labelled_in_the_labels_teach_nothing(relabelled):
  run = relabelled
  labels_XP = bridges.directions_of(run.experiment, run.experiment.test)
  assert np.isnan(labels_XP[:, ADDED]).all() and np.isfinite(labels_XP[:, KEPT_NEW]).all()
  assert np.isfinite(_column(run, "label_loss")).all()
  for table in ("pole_PQD", "bias_PK"):  # what the head reads by
    before, after = (_table(params, table) for params in (run.before, run.params))
    np.testing.assert_array_equal(before[ADDED], after[ADDED])
    assert (before[KEPT_NEW] != after[KEPT_NEW]).any(axis=tuple(range(1, before.ndim))).all()
  # What is known of the others is measured in them alone.
  inferred_XPK = bridges.inferred_logits(run.experiment, run.params, run.experiment.test)
  rows = bridges.preference_rows(run.experiment, softmax(inferred_XPK))
  assert {row["labels"] for row in rows} == {len(labels_XP) * len(KEPT_NEW)}


@pytest.fixture(scope="module")
def small(trained) -> Path:
  """What says of a run that its bridge is smaller."""
  workdir = trained.workdir.parent / "small"
  workdir.mkdir()
  config = json.loads((trained.workdir / "config.json").read_text())
  config["bridge"]["size"] = 8
  (workdir / "config.json").write_text(json.dumps(config))
  shutil.copy(trained.workdir / experiments.SPACE, workdir)
  return workdir


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"bridge.new_only": True}, "set config.bridge.start to a run and config.bridge.alone to True"),
    ({"bridge.new_only": True, "bridge.alone": True}, "set config.bridge.start to a run"),
    ({"bridge.new_only": True, "bridge.start": "trained"}, "config.bridge.alone to True"),
    (
      {"bridge.new_only": True, "bridge.alone": True, "bridge.start": "trained"},
      "no dimension that .*trained has not; set config.bridge.space",
    ),
    ({"bridge.start": "nowhere"}, r"nowhere holds no run \(no config.json\); train there first"),
    ({"bridge.start": "told"}, "told is no run with a learned bridge: train there with"),
    ({"bridge.start": "small"}, "config.bridge.size is 16; .*small has 8: set it likewise"),
  ],
)
def test_a_start_that_cannot_be_is_refused(trained, told, small, fields, message):
  if name := fields.get("bridge.start"):
    fields = fields | {"bridge.start": str(trained.workdir.parent / name)}
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    experiments.load_experiment(_copy(trained, fields))


@pytest.mark.parametrize("use", [experiments.run_training, experiments.trained_params])
def test_a_bridge_is_not_used_in_another_space(trained, new_space, use):
  fields = {"bridge.space": new_space["bridge.space"]}
  experiment = experiments.load_experiment(_copy(trained, fields))
  saved = (trained.workdir / experiments.SPACE).read_text()
  with pytest.raises(ValueError, match="The bridge in .* is of .*'old' .* in use is 'new'"):
    use(experiment, trained.workdir)
  assert (trained.workdir / experiments.SPACE).read_text() == saved


# ------------------------------------------------------------------ what a run starts from


def _text_scores(experiment, params):
  return measuring.text_scorer(experiment, "any", params).score("none")


@pytest.fixture(scope="module")
def readapted(adapted, directory) -> Run:
  """A run with an adapter that starts from one that has one too."""
  fields = {"bridge.start": str(adapted.workdir)}
  return _run(_copy(adapted, fields), directory / "readapted")


def test_the_reference_is_the_model_that_training_starts_from(readapted, adapted):
  """Wherever it is asked for: in each step, from the cache, in what is measured, restored."""
  run, start = readapted, adapted.experiment
  base = run.experiment.load_base()
  plain = loading.load_params(start.config, start.model, start.mesh)
  expected = _text_scores(start, adapted.params)
  assert np.abs(_text_scores(start, plain) - expected).max() > 1e-2
  for params in (base, without_lora(base)):  # of the cache; of each step
    np.testing.assert_allclose(_text_scores(run.experiment, params), expected, atol=1e-3)
  assert fingerprint(base) != fingerprint(plain)  # so the cache of other runs is not taken
  assert not any(np.any(x) for name, x in _named(run.before).items() if "_lora_b" in name)
  assert not _changed(run.params, experiments.trained_params(run.experiment, run.workdir))
  as_start = start.of_run(str(run.workdir))
  assert not _changed(run.params, experiments.restored_params(as_start))


def test_an_adapter_is_trained_beside_weights_that_another_run_trained(trained):
  fields = {"bridge.start": str(trained.workdir), "lora.rank": 3, "reference.kind": "online"}
  started = experiments.load_experiment(_copy(trained, fields)).load_base()
  plain = {name: x for name, x in _named(started).items() if "_lora_" not in name}
  assert len(plain) < len(_named(started))
  for name, expected in _named(trained.params).items():
    np.testing.assert_array_equal(plain[name], expected)


def test_what_is_measured_of_a_start_is_not_called_the_base(extended, trained):
  scorer = measuring.base_scorer(extended.experiment)
  rows = measuring.base_results(extended.experiment, scorer, ["ica"])
  assert {row["policy"] for row in rows} == {"length", "start"}
  expected = _text_scores(trained.experiment, trained.params)
  np.testing.assert_array_equal(scorer.score("none"), expected)


def test_how_a_run_is_read_is_said_by_the_one_that_reads(extended, trained, tmp_path):
  """Not by the run, nor by files that it was made with."""
  workdir = Path(shutil.copytree(extended.workdir, tmp_path / "moved"))
  config = json.loads((workdir / "config.json").read_text())
  config["bridge"]["space"] = str(tmp_path / "gone.json")
  (workdir / "config.json").write_text(json.dumps(config))
  fields = {"eval.rows": 6, "bridge.start": str(workdir), "bridge.new_only": False}
  fields |= {
    name: extended.experiment.config.data[name[5:]] for name in ("data.path", "data.space")
  }
  experiment = experiments.load_experiment(_copy(trained, fields))
  start = experiment.of_run(str(workdir))
  assert start.space == NEW and start.config.eval.rows == 6
  assert not _changed(extended.params, experiments.restored_params(start))


# ------------------------------------------------------------------ evaluation


def test_a_run_is_measured_the_same_each_time(measured, tmp_path):
  rows = _results(measured.workdir, "policy", "condition", "protocol")
  for condition in ("inferred", "golden", "shuffled"):
    for protocol in ("matched", "release"):
      assert ("pba_head", condition, protocol) in rows
  assert ("pba_head", "none", "matched") in rows
  assert len(rows) == len(set(rows))
  preferences = json.loads((measured.workdir / "preferences.json").read_text())
  assert [row["predictor"] for row in preferences][:2] == ["head", "frequencies"]
  assert all(row["users"] == len(measured.experiment.test) for row in preferences)
  shutil.copytree(measured.workdir, tmp_path / "copy")
  for name in ("results.json", "preferences.json", bridges.CALIBRATION):
    (tmp_path / "copy" / name).unlink()
  params = experiments.trained_params(measured.experiment, tmp_path / "copy")
  measuring.measure(measured.experiment, params, tmp_path / "copy")
  for name in ("results.json", "preferences.json", bridges.CALIBRATION):
    assert (tmp_path / "copy" / name).read_text() == (measured.workdir / name).read_text()


def test_the_temperature_is_fitted_on_the_validation_split_and_kept(measured, tmp_path):
  experiment, params = measured.experiment, measured.params
  logits_XPK = bridges.inferred_logits(experiment, params, experiment.validation)
  labels_XP = np.array([example.directions for example in experiment.validation])
  kept = json.loads((measured.workdir / bridges.CALIBRATION).read_text())
  assert kept["temperature"] == fit_temperature(logits_XPK, labels_XP) != 1
  assert kept["users"] == len(labels_XP)
  # Of these weights: others have their own.
  bridge = lambda path: "bias_PK" in jax.tree_util.keystr(path)
  other = jax.tree_util.tree_map_with_path(lambda p, x: x + 1 if bridge(p) else x, params)
  shutil.copytree(measured.workdir, tmp_path / "copy")
  bridges.temperature_of(experiment, other, tmp_path / "copy")
  again = json.loads((tmp_path / "copy" / bridges.CALIBRATION).read_text())
  assert again["weights"] != kept["weights"]
  assert load_preference_model(measured.workdir).temperature == kept["temperature"]


def test_what_is_measured_is_the_calibrated_inference(measured):
  scorer = measuring.policy_scorer(measured.experiment, measured.params, measured.workdir)
  model = load_preference_model(measured.workdir)
  for i in (0, 7):
    example = measured.experiment.test[i]
    inferred = infer_preferences(model, example.persona, example.post)
    np.testing.assert_allclose(scorer.inferred_XPK[i], inferred.probabilities_PK, atol=1e-5)


def test_every_condition_tells_the_policy_what_it_says(measured):
  experiment = measured.experiment
  rng = np.random.default_rng(0)
  # What a few steps leave small is made large: tokens that differ, and what they do.
  scales = {"v_DKA": 10.0, "o_HAD": 10.0}

  def enlarged(path, x):
    name = jax.tree_util.keystr(path)
    if "token_PKD" in name:
      return jax.device_put(rng.normal(size=x.shape).astype(np.float32), x.sharding)
    return x * next((scale for part, scale in scales.items() if part in name), 1.0)

  params = jax.tree_util.tree_map_with_path(enlarged, measured.params)
  scorer = measuring.policy_scorer(experiment, params, measured.workdir)
  scorer = dataclasses.replace(
    scorer, inferred_XPK=rng.dirichlet([0.3] * 3, scorer.inferred_XPK.shape[:2])
  )
  model = PreferenceModel.of(experiment, params)
  space, other = experiment.space, others(len(experiment.test))
  found = {("inferred",): [], ("inferred", True): [], ("golden",): [], ("none",): []}
  for i in (0, 7):
    example = experiment.test[i]
    assert other[i] != i
    given = (
      Preferences(space, scorer.inferred_XPK[i]),
      Preferences(space, scorer.inferred_XPK[other[i]]),
      Preferences.from_directions(space, example.directions),
      Preferences.neutral(space),
    )
    for (key, scores), preferences in zip(found.items(), given, strict=True):
      responses = [example.chosen, example.rejected]
      scores.append(score_responses(model, example.post, responses, preferences))
      np.testing.assert_allclose(scorer.score(*key)[i], scores[-1], rtol=2e-5)
  for one, another in itertools.combinations(found.values(), 2):
    assert np.abs(np.subtract(one, another)).max() > 0.02  # ten times what is allowed above


# ------------------------------------------------------------------ P̃ as text


@pytest.fixture(scope="module")
def told(measured) -> Run:
  """A policy that reads as text what the trained run's head infers."""
  # A threshold at which users differ after so few steps: the first dimension is stated of half.
  scorer = measuring.policy_scorer(measured.experiment, measured.params, measured.workdir)
  stated_X = scorer.inferred_XPK[:, 0, [0, 2]].max(axis=1)
  fields = {
    "bridge.kind": "text",
    "bridge.inferred_by": str(measured.workdir),
    "bridge.threshold": float(np.median(stated_X)),
    "train.steps": 2,
  }
  experiment = bridges.told_by(experiments.load_experiment(_copy(measured, fields)))
  workdir = measured.workdir.parent / "told"
  before = jax.device_get(experiment.load_base())
  params = experiments.run_training(experiment, workdir).params
  return Run(experiment, workdir, before, params, read_metrics(workdir))


def test_profiles_are_what_the_head_infers(told, measured):
  model = load_preference_model(measured.workdir)
  threshold = told.experiment.config.bridge.threshold
  for split in ("train", "test"):
    examples, plain = getattr(told.experiment, split), getattr(measured.experiment, split)
    assert len(examples) == len(plain) > 0
    for i in (0, 5, len(plain) - 1):
      inferred = infer_preferences(model, plain[i].persona, plain[i].post)
      assert examples[i].profile == inferred.verbalise(threshold)
    assert len({example.profile for example in examples}) > 1


def test_a_policy_of_another_model_is_told_the_same(told, measured):
  fields = {"model.weights": "preset:tiny8", "model.preset": "tiny8", "eval.every": 2}
  experiment = experiments.load_experiment(_copy(told, fields))
  experiment = dataclasses.replace(experiment, validation=experiment.test[:4])
  other = bridges.told_by(experiment)
  assert list(other.test.profiles) == list(told.experiment.test.profiles)
  assert list(other.validation.profiles) == list(told.experiment.test.profiles)[:4]


def test_a_run_that_is_refused_leaves_nothing_in_the_workdir(told, trained, tmp_path):
  workdir = Path(shutil.copytree(told.workdir, tmp_path / "run"))
  before = sorted(path.name for path in workdir.rglob("*"))
  with pytest.raises(ValueError, match="holds a run with another config: bridge.inferred_by was"):
    experiments.run_training(trained.experiment, workdir)
  assert sorted(path.name for path in workdir.rglob("*")) == before


def test_a_policy_is_trained_on_profiles_and_measured_with_its_controls(told, capsys):
  experiment = told.experiment
  assert experiment.formatting.condition == "profile"
  example = experiment.train[0]
  loader = Loader(experiment.train, experiment.formatting, rows=2)
  ids = loader.tokenised(0)[1].context
  text = bytes(i for i in ids if i < 256).decode()  # without the special tokens
  assert example.profile in text
  assert not any(act.comment in text for act in example.persona.comments)
  assert told.lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
  measuring.measure(experiment, told.params, told.workdir)
  rows = _results(told.workdir, "policy", "condition")
  for condition in ("profile", "golden", "shuffled", "none"):
    assert ("pba_by_head", condition) in rows
  assert "| pba_by_head | profile " in capsys.readouterr().out


# ------------------------------------------------------------------ what is no bridge


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("bridge.kind", "tokens", "config.bridge.kind is 'tokens'; set it to text or head"),
    ("bridge.size", 0, "config.bridge.size is 0; set it to 1 or more"),
    ("bridge.forcing", (3.0, -1.0), r"config.bridge.forcing is \(3.0, -1.0\); .* from 0 to 1"),
    ("bridge.label_weight", -1.0, "config.bridge.label_weight is -1.0; set it to 0 or more"),
    ("regions.persona", 0, "config.regions.persona is 0"),
    ("regions.parts", 0, "config.regions.parts is 0"),
    ("regions.prompt", 10**6, "config.regions.prompt and response make"),
  ],
)
def test_a_bridge_that_cannot_be_is_refused_by_its_field(directory, field, value, message):
  config = _config(directory / "old", {field: value})
  with pytest.raises(ValueError, match=message):
    experiments.load_experiment(config)


@pytest.mark.parametrize("field", ["alone", "new_only", "start"])
def test_what_is_of_a_learned_bridge_is_refused_without(directory, field):
  value = "runs/other" if field == "start" else True
  config = _config(directory / "old", {"bridge.kind": "text", f"bridge.{field}": value})
  with pytest.raises(ValueError, match=rf"config\.bridge\.{field} is of a learned bridge"):
    experiments.load_experiment(config)


def test_a_learned_bridge_is_measured_on_benchmarks_in_their_own_space(measured, directory):
  (directory / "published").mkdir()
  records = [small_record(i) for i in range(6)]
  del records[2]["Preference Direction"]
  (directory / "published" / "test_ugc.json").write_text(json.dumps(records))
  calibration = (measured.workdir / bridges.CALIBRATION).read_text()
  subject = load_subject(_copy(measured), measured.workdir)
  results, told = run_benchmarks(
    subject, directory / "benchmarked", ["test_ugc"], str(directory / "published")
  )
  found = {(r["condition"], r["protocol"]): r for r in results if r["policy"] == "pba_head"}
  assert found.keys() == {
    *((c, p) for c in ("inferred", "golden", "shuffled") for p in ("matched", "release")),
    ("none", "matched"),
  }
  assert found["golden", "matched"]["examples"] == 5 and found["none", "matched"]["examples"] == 6
  assert (
    "test_ugc: pba_head, golden, matched/release: 1 not scored: no golden P̃ to tell"
    in (told["test_ugc"])
  )
  # The temperature that the run was evaluated with is used, and kept.
  assert (measured.workdir / bridges.CALIBRATION).read_text() == calibration
