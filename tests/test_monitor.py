"""Numbers that are not finite, what they were of, and what a running step tells."""

import json

import jax
import numpy as np
import pytest

from alignx_jax.experiments import experiment as experiments
from alignx_jax.experiments.replay import replay
from alignx_jax.training import loop
from alignx_jax.training.checkpoints import Checkpoints
from alignx_jax.training.metrics import read_metrics
from tests.processes import run_together
from tests.small_records import small_config, write_small_records


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_small_records(tmp_path_factory.mktemp("data") / "records.json")


def run(config, workdir):
  return experiments.run_training(experiments.load_experiment(config), workdir)


def events(workdir, kind):
  lines = (workdir / "logs" / "host_0.jsonl").read_text().splitlines()
  return [line for line in map(json.loads, lines) if line["event"] == kind]


@pytest.fixture
def broken_reference(monkeypatch):
  """`broken_reference(examples)`: the reference's log-probs of these are NaN."""

  def use(examples):
    cached = loop.cached_reference

    def broken(*args):
      scores = np.array(cached(*args))
      scores[examples] = np.nan
      return scores

    monkeypatch.setattr(loop, "cached_reference", broken)
    monkeypatch.setattr("alignx_jax.experiments.replay.cached_reference", broken)

  return use


def test_a_step_that_is_not_finite_is_left_out_and_told(tmp_path, data, broken_reference):
  config = small_config(data)
  broken_reference([5])
  result = run(config, tmp_path / "run")
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.params))
  lines = read_metrics(tmp_path / "run")
  (skipped,) = [line for line in lines if line["skipped"]]
  assert np.isnan(skipped["loss"]) and np.isnan(skipped["gradient_norm"])
  assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
  (event,) = events(tmp_path / "run", "skipped")
  bad = experiments.load_experiment(config).train[5]
  assert event["step"] == skipped["step"] and bad.id in event["examples"]
  logs = (tmp_path / "run" / "logs" / "host_0.jsonl").read_text()
  assert bad.chosen not in logs  # nothing that users wrote

  # The update that was left out changed nothing.
  at = skipped["step"]
  config.train.update(checkpoint_every=1, keep_checkpoints=99)
  run(config, tmp_path / "each")
  states = Checkpoints(tmp_path / "each", keep=99)
  like = jax.tree.map(np.asarray, experiments.load_experiment(config).load_base())
  assert at > 0  # there is a checkpoint before it
  before, after = (jax.tree.leaves(_params(states, like, step)) for step in (at, at + 1))
  for x, y in zip(before, after, strict=True):
    np.testing.assert_array_equal(x, y)


def _params(checkpoints, like, step):
  found = checkpoints._newest([step], {"params": like}, lambda run: None, aside=False)
  return found.state["params"]


def test_log_text_shows_what_users_wrote(tmp_path, data, broken_reference):
  config = small_config(data)
  config.train.log_text = True
  broken_reference([5])
  run(config, tmp_path / "run")
  (event,) = events(tmp_path / "run", "skipped")
  bad = experiments.load_experiment(config).train[5]
  assert [bad.post, bad.chosen, bad.rejected] in event["texts"]


def test_a_run_gives_up_after_several_and_its_batches_are_replayed(
  tmp_path,
  data,
  broken_reference,
):
  config = small_config(data)
  broken_reference(slice(None))
  with pytest.raises(FloatingPointError, match=r"3 steps in a row .* from step 0 on") as stopped:
    run(config, tmp_path / "run")
  (file,) = (tmp_path / "run").glob("replay_*.json")
  assert f"--replay_batch={file}" in str(stopped.value)
  experiment = experiments.load_experiment(config)
  told = replay(experiment, tmp_path / "run", str(file))
  assert "step 0 row 0: loss nan" in told and "step 2 row 1: loss nan" in told
  first = told.splitlines()[0]
  named = [example.id for example in experiment.train if example.id in first]
  assert named and all(id in str(stopped.value) for id in named)
  assert "not finite in the gradient of" in told


def test_a_spike_of_the_gradient_is_told_with_its_examples(tmp_path, data):
  config = small_config(data)
  config.train.update(epochs=3, spike_factor=1e-6)
  run(config, tmp_path / "run")
  found = events(tmp_path / "run", "spike")
  assert found and found[0]["step"] == 10 and found[0]["examples"]


def test_where_the_time_goes_adds_up(tmp_path, data):
  config = small_config(data)
  run(config, tmp_path / "run")
  lines = read_metrics(tmp_path / "run")
  for line in lines:
    assert 0 < line["goodput"] <= 1
    assert all(line[f"seconds/{what}"] >= 0 for what in ("step", "data", "checkpoint"))
    assert "mfu" not in line  # the peak of a CPU is not known
  assert any(line["seconds/checkpoint"] > 0 for line in lines)
  beat = json.loads((tmp_path / "run" / "heartbeat_0.json").read_text())
  assert beat["step"] == 0 and beat["pid"]


def test_the_profiler_writes_the_window_that_is_asked_for(tmp_path, data):
  config = small_config(data)
  config.train.profile = (2, 4)
  run(config, tmp_path / "run")
  assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_the_best_and_every_so_manieth_checkpoint_are_kept(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1, every=4)
  from tests.test_damage import state_like

  accuracies = {1: 0.5, 2: 0.9, 3: 0.6, 4: 0.7, 5: None, 6: 0.8, 7: None}
  for step, accuracy in accuracies.items():
    checkpoints.save(step, state_like(), {}, accuracy=accuracy)
  checkpoints.close()
  assert Checkpoints(tmp_path, keep=1, every=4).steps() == [2, 4, 7]


SAME = """
from alignx_jax.training import hosts
import jax
hosts.connect()
hosts.barrier("start", 60)
mine = str(jax.process_index() // {divisor})
try:
  hosts.check_same({{"mesh": "m", "config": mine, "data": "d"}})
  print("same")
except ValueError as error:
  print(error)
"""


def test_hosts_that_differ_are_told_what_in_and_which():
  for output in run_together(["-c", SAME.format(divisor=9)], processes=2, devices=1):
    assert output.strip().endswith("same")
  for output in run_together(["-c", SAME.format(divisor=1)], processes=2, devices=1):
    assert "not have the same config (process 1) as process 0" in output


MISSING = """
import os, time
from alignx_jax.training import hosts
import jax
hosts.connect()
if jax.process_index() == 0:
  try:
    hosts.barrier("start", 2)
  except RuntimeError as error:
    print(error, flush=True)
  time.sleep(6)  # the first is the one that all depend on: it leaves last
else:
  time.sleep(5)
os._exit(0)
"""


def test_a_host_that_does_not_come_is_named():
  first, _ = run_together(["-c", MISSING], processes=2, devices=1)
  assert "Waited 2 s at 'start' for process 1 of 2" in first
