"""Numbers that are not finite, what they were of, and what a running step tells."""

import json
import shutil
import time

import jax
import numpy as np
import pytest

from alignx_jax.experiments import experiment as experiments
from alignx_jax.experiments.replay import replay
from alignx_jax.training import loop
from alignx_jax.training.checkpoints import Checkpoints
from alignx_jax.training.metrics import read_metrics
from alignx_jax.training.monitor import SPENT, Monitor, Pending
from alignx_jax.training.stopping import StopRequest
from tests.processes import run_together
from tests.small_records import small_config, small_record, write_small_records


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


def test_a_step_that_is_not_finite_is_left_out_and_told(tmp_path, data, broken_reference, caplog):
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
  assert bad.id in caplog.text

  # The update that was left out changed nothing.
  at = skipped["step"]
  config.train.update(checkpoint_every=1, keep_checkpoints=99)
  run(config, tmp_path / "each")
  states = Checkpoints(tmp_path / "each", keep=99)
  like = jax.tree.map(np.asarray, experiments.load_experiment(config).load_base())
  assert at > 0  # there is a checkpoint before it
  before, after = (
    jax.tree.leaves(states.newest_params(like, only=step).state) for step in (at, at + 1)
  )
  for x, y in zip(before, after, strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_what_is_logged_has_no_word_that_a_user_wrote(tmp_path, broken_reference, caplog, capfd):
  path = tmp_path / "records.json"
  path.write_text(json.dumps([_marked(small_record(i)) for i in range(48)]))
  config = small_config(path)
  config.train.update(spike_factor=0.0, epochs=3)
  assert "Zwieback" in experiments.load_experiment(config).train[0].persona.comments[0].comment
  broken_reference([5])
  run(config, tmp_path / "run")
  assert events(tmp_path / "run", "skipped") and events(tmp_path / "run", "spike")
  broken_reference(slice(None))
  with pytest.raises(FloatingPointError) as stopped:
    run(config, tmp_path / "given_up")
  files = [*tmp_path.glob("*/logs/*"), *tmp_path.glob("*/*.json*")]
  assert {"host_0.jsonl", "config.json", "metrics.jsonl"} < {file.name for file in files}
  told = "".join(file.read_text() for file in files) + caplog.text + str(stopped.value)
  assert "records.json:" in told and "Zwieback" not in told + "".join(capfd.readouterr())


def _marked(record):
  """A record with this word in every text."""
  if isinstance(record, dict):
    return {key: _marked(value) for key, value in record.items()}
  if isinstance(record, list):
    return [_marked(value) for value in record]
  return f"{record} Zwieback" if isinstance(record, str) else record


def test_log_text_shows_what_users_wrote(tmp_path, data, broken_reference):
  config = small_config(data)
  config.train.log_text = True
  broken_reference([5])
  run(config, tmp_path / "run")
  (event,) = events(tmp_path / "run", "skipped")
  bad = experiments.load_experiment(config).train[5]
  assert [bad.post, bad.chosen, bad.rejected] in event["texts"]


@pytest.mark.slow
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
  body = json.loads(file.read_text())
  ids = {example.id for example in experiment.train}
  assert len(body["examples"]) == 3 and all(set(of) <= ids and of for of in body["examples"])
  told = replay(experiment, tmp_path / "run", str(file))
  assert "step 0 row 0: loss nan" in told and "step 2 row 1: loss nan" in told
  first = told.splitlines()[0]
  named = [example.id for example in experiment.train if example.id in first]
  assert named and all(id in str(stopped.value) for id in named)
  assert "not finite in the gradient of" in told


@pytest.mark.parametrize("bad_steps", [(2, 3, 4), (3, 4)])
def test_a_run_gives_up_with_the_state_before_the_bad_steps(tmp_path, data, monkeypatch, bad_steps):
  """Which a later step, begun before the last of them was read, would have changed."""
  make_steps, done = loop.make_steps, []

  def broken(*args):
    programs = make_steps(*args)

    def train(state, frozen, rows):
      done.append(len(done))
      if done[-1] in bad_steps:
        rows = rows._replace(weight_BE=rows.weight_BE * np.nan)
      return programs.train(state, frozen, rows)

    return programs._replace(train=train)

  monkeypatch.setattr(loop, "make_steps", broken)
  config = small_config(data)
  config.train.update(stop_after_skipped=3, keep_checkpoints=99)
  if len(bad_steps) < 3:
    assert run(config, tmp_path / "run").steps == 6
    return
  with pytest.raises(FloatingPointError, match="3 steps in a row .* from step 2 on"):
    run(config, tmp_path / "run")
  assert done == [0, 1, 2, 3, 4]  # step 5 was not begun
  states = Checkpoints(tmp_path / "run", keep=99)
  (file,) = (tmp_path / "run").glob("replay_*.json")
  saved = json.loads(file.read_text())["checkpoint"]
  assert saved == states.steps()[-1] == 5
  like = jax.tree.map(np.asarray, experiments.load_experiment(config).load_base())
  before, after = (states.newest_params(like, only=step).state for step in (2, 5))
  for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    np.testing.assert_array_equal(x, y)


class Spiking:
  """A monitor of steps with these gradient norms."""

  def __init__(self, tmp_path, data, **settings):
    config = small_config(data)
    config.train.update(settings)
    self.loader = experiments.training_loader(experiments.load_experiment(config))
    self.rows, self.lanes_BW = next(self.loader.batches(self.loader.start()))
    self.monitor = Monitor(
      config,
      tmp_path / "run",
      self.loader,
      first=0,
      steps=99,
      ideal_seconds=None,
      fingerprint="",
      gather=lambda x: x,
      began=time.perf_counter(),
    )

  def report(self, step, norm=1.0):
    pairs = dict.fromkeys(("loss", "reward_accuracy", "margin", "filled"), (1.0, 2.0))
    pairs |= {"gradient_norm": (norm, 1.0), "skipped": (0.0, 1.0)}
    self.monitor.report(Pending(step, self.rows, self.lanes_BW, pairs, np.array(False)))


def test_a_spike_of_the_gradient_is_told_with_its_examples_and_nothing_else_is(tmp_path, data):
  steps = Spiking(tmp_path, data, spike_factor=10.0)
  for step in range(30):
    steps.report(step, 20.0 if step in (3, 17) else 1 + step / 10)
  (event,) = events(tmp_path / "run", "spike")  # of step 3 nobody knows what is usual
  assert event["step"] == 17 and event["norm"] == 20 and 1 < event["usual"] < 3
  assert event["examples"] == steps.monitor.ids(steps.rows)


def test_no_time_is_lost_between_lines_of_metrics_or_before_the_first(tmp_path, data):
  steps = Spiking(tmp_path, data, log_every=4)
  for step in range(9):
    with steps.monitor.spending("checkpoint"):
      time.sleep(0.01)
    steps.report(step)
  steps.monitor.close()
  lines = read_metrics(tmp_path / "run")
  assert [line["step"] for line in lines] == [0, 4, 8]
  spent = {what: sum(line[f"seconds/{what}"] for line in lines) for what in SPENT}
  totals = steps.monitor.totals()
  for what in ("setup", "checkpoint"):
    assert spent[what] == pytest.approx(totals[f"seconds/{what}"])
  assert spent["checkpoint"] > 0.09 and spent["setup"] > 0
  assert lines[-1]["goodput"] == pytest.approx(spent["step"] / sum(spent.values()), rel=0.05)


def test_where_the_time_goes_adds_up(tmp_path, data):
  config = small_config(data)
  run(config, tmp_path / "run")
  lines = read_metrics(tmp_path / "run")
  for line in lines:
    assert 0 < line["goodput"] <= 1
    assert all(line[f"seconds/{what}"] >= 0 for what in ("step", "data", "checkpoint"))
    assert "mfu" not in line  # the peak of a CPU is not known
  assert any(line["seconds/checkpoint"] > 0 for line in lines)
  (end,) = events(tmp_path / "run", "end")
  assert end["seconds/setup"] > 0 and 0 < end["goodput"] < 1 - end["seconds/setup"] / 1e3
  beat = json.loads((tmp_path / "run" / "heartbeat_0.json").read_text())
  assert beat["step"] == 0 and beat["pid"]


def test_the_profiler_writes_the_window_that_is_asked_for(tmp_path, data):
  config = small_config(data)
  config.train.profile = (2, 4)
  run(config, tmp_path / "run")
  assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_a_window_of_the_profiler_may_begin_before_a_resumed_run_and_end_after_it(tmp_path, data):
  config = small_config(data)
  config.train.profile = (1, 99)
  profile = tmp_path / "run" / "profile"
  for _ in range(2):
    run(config, tmp_path / "run")
    assert list(profile.rglob("*.xplane.pb"))
    shutil.rmtree(profile)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_stop_beside_an_evaluation_changes_nothing_of_what_is_best(
  tmp_path, data, monkeypatch, when
):
  """Before it, the next start makes up for it; during it, it is waited for."""
  config = small_config(data)
  config.eval.every, config.train.keep_checkpoints = 2, 1
  experiment, accuracies, asked = experiments.load_experiment(config), [0.3, 0.9, 0.5], []

  class Asked(StopRequest):
    @property
    def asked(self):
      return asked == [True]

  def evaluate(params):
    if when == "during" and len(accuracies) == 2 and not asked:
      asked.append(True)
    return accuracies.pop(0)

  def report(self, pending, report=Monitor.report):
    if when == "before" and pending.step == 2 and not asked:
      asked.append(True)
    return report(self, pending)

  monkeypatch.setattr(loop, "StopRequest", Asked)
  monkeypatch.setattr(Monitor, "report", report)
  with pytest.raises(SystemExit):
    experiments.run_training(experiment, tmp_path / "run", evaluate=evaluate)
  assert len(accuracies) == {"before": 2, "during": 1}[when]
  assert max(Checkpoints(tmp_path / "run", keep=1).steps()) == 4
  asked.append("once")
  experiments.run_training(experiment, tmp_path / "run", evaluate=evaluate)
  assert not accuracies
  assert Checkpoints(tmp_path / "run", keep=1).steps() == [4, 6]


@pytest.mark.parametrize("starts", [1, 3])
def test_the_best_and_every_so_manieth_checkpoint_are_kept(tmp_path, starts):
  from tests.test_damage import state_like

  accuracies = {1: 0.5, 2: 0.9, 3: 0.6, 4: 0.7, 5: None, 6: 0.8, 7: None}
  for steps in np.array_split(list(accuracies), starts):
    checkpoints = Checkpoints(tmp_path, keep=1, every=4)
    for step in steps.tolist():
      checkpoints.save(step, state_like(), {}, accuracy=accuracies[step])
    checkpoints.close()
  assert Checkpoints(tmp_path, keep=1, every=4).steps() == [2, 4, 7]


SAME = """
from alignx_jax.training import hosts
import jax
hosts.connect()
hosts.barrier("start", 60)
mine = str(jax.process_index() // {divisor})
try:
  hosts.check_same(lambda: {{"mesh": "m", "config": mine, "data": "d"}})
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
