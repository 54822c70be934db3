"""Sweeps: what is tried, what is refused before any trial runs, what comes of the trials."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from alignx_jax.sweeps import cluster, pictures, plan, space, table
from alignx_jax.sweeps.halving import Halving
from alignx_jax.sweeps.options import sweep_options
from configs import base
from tests.pages import shown_on_pages

SWEEPS = sorted((Path(__file__).parents[1] / "configs" / "sweeps").glob("*.py"))


def _config():
  config = base.get_config()
  with config.unlocked():
    config.sweep = sweep_options()
  return config


def _planned(tmp_path, trials, config=None):
  """The plan of a sweep file that yields these (name, overrides)."""
  path = tmp_path / "file.py"
  path.write_text(
    "from alignx_jax.sweeps.space import Trial\n"
    f"def get_sweep():\n  for trial in {trials!r}:\n    yield Trial(*trial)\n"
  )
  return plan.make_plan(path, config or _config(), tmp_path / "sweep")


# ------------------------------------------------------------------ what is tried


def test_grids_crosses_and_names():
  made = list(space.grid({"objective.beta": (0.1, 0.3), "seed": range(2)}))
  assert [tuple(one.values()) for one in made] == [(0.1, 0), (0.1, 1), (0.3, 0), (0.3, 1)]
  crossed = list(space.cross([{"a": 1}, {"a": 2, "b": 3}], space.grid({"seed": (0, 1)})))
  assert crossed[2:] == [{"a": 2, "b": 3, "seed": 0}, {"a": 2, "b": 3, "seed": 1}]
  with pytest.raises(ValueError, match="'a'; leave it out of one"):
    list(space.cross([{"a": 1}], [{"a": 2}]))
  assert space.trial(made[1]).name == "beta=0.1,seed=1"
  # Fields whose last parts are the same are named whole.
  assert space.name_of({"lora.rank": 2, "x.rank": 3}) == "lora.rank=2,x.rank=3"
  assert space.name_of({"history.kinds": ("ugc", "pair")}) == "kinds=ugc+pair"


def test_a_sweep_as_its_page_shows_it():
  (code,) = shown_on_pages(r"def get_sweep")
  names = {}
  exec(code, names)
  trials = list(names["get_sweep"]())
  assert len(trials) == 9
  assert trials[-1] == space.trial({"objective.beta": 0.3, "seed": 2})


def test_samples_are_the_same_for_a_seed_and_spread_by_factors():
  draws = {"rate": space.log_uniform(1e-4, 1e-2), "kind": ("a", "b"), "x": space.uniform(-1, 1)}
  made = list(space.sample(400, draws, seed=3))
  assert made == list(space.sample(400, draws, seed=3)) != list(space.sample(400, draws, seed=4))
  rates = np.array([one["rate"] for one in made])
  assert rates.min() >= 1e-4 and rates.max() <= 1e-2
  assert 0.4 < (rates < 1e-3).mean() < 0.6  # half of them below the geometric middle
  assert {one["kind"] for one in made} == {"a", "b"}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_ready_sweeps_are_whole_and_their_trials_differ(path, tmp_path):
  if path.stem == "small":
    return
  config = plan._module(path).get_config()
  trials = plan.make_plan(path, config, tmp_path)
  assert f"--sweep=configs/sweeps/{path.name}" in path.read_text(encoding="utf-8")
  assert len({json.dumps(plan._flat(trial.config)) for trial in trials}) == len(trials)
  for group in table.settings(table.read_rows(trials)).values():
    assert len({row.trial.config.seed for row in group}) == len(group) == 3
  if path.stem == "objective_ablation":
    assert len(trials) == 36


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
  "text, said",
  [
    ("", r"has no get_sweep\(\); write one"),
    ("import not_a_module", "cannot be imported: ModuleNotFoundError: No module named 'not_a_mo"),
    ("def get_sweep():\n  return 1 / 0", "fails: ZeroDivisionError"),
    ("def get_sweep():\n  return []", "yields no trial"),
    ("def get_sweep():\n  yield {'seed': 1}", "as number 0; yield a Trial"),
  ],
)
def test_a_file_that_is_no_sweep(tmp_path, text, said):
  path = tmp_path / "file.py"
  path.write_text(text)
  with pytest.raises(ValueError, match=said):
    plan.make_plan(path, _config(), tmp_path)


@pytest.mark.parametrize(
  "trials, said",
  [
    ([("a", {}), ("a", {"seed": 1})], "two trials of the name 'a'; name them by all"),
    ([("a/b", {})], "'a/b' cannot be a folder's"),
    ([("..", {})], "cannot be a folder's"),
    ([("a", {"objective.bta": 1})], "trial 'a': there is no config field 'objective.bta'"),
    ([("a", {"train.rows": "x"})], "config.train.rows is 'x'; give a int"),
    ([("a", {"objective.loss": "orpo"})], "trial 'a': config.objective.loss is 'orpo'"),
  ],
)
def test_trials_that_cannot_be(tmp_path, trials, said):
  with pytest.raises(ValueError, match=said):
    _planned(tmp_path, trials)


def test_a_trial_that_was_run_with_another_config(tmp_path):
  before = _planned(tmp_path, [("a", {"seed": 1}), ("b", {"seed": 2})])
  plan.save_plan(before, tmp_path)
  changed = _planned(tmp_path, [("b", {"seed": 5})])
  plan.check_unchanged(changed, tmp_path)  # it has not been run yet
  for trial in before:
    trial.workdir.mkdir(parents=True)
  plan.check_unchanged(before, tmp_path)
  plan.check_unchanged(_planned(tmp_path, [("c", {"seed": 3})]), tmp_path)
  with pytest.raises(ValueError, match="'b' in .*: seed was 2 and is 5. Use another --workdir, or"):
    plan.check_unchanged(changed, tmp_path)
  (tmp_path / "trials" / "a").mkdir(parents=True)
  assert plan.save_plan(_planned(tmp_path, [("c", {"seed": 3})]), tmp_path) == ["a"]


def test_a_trial_shares_the_sweeps_reference_and_nothing_of_its_options(tmp_path):
  (one,) = _planned(tmp_path, [("a", {"history.kinds": ("ugc",)})])
  assert one.config.reference.directory == str(tmp_path / "sweep/cache/reference")
  assert "sweep" not in one.config and one.config.history.kinds == ("ugc",)
  config = _config()
  config.reference.directory = "elsewhere"
  assert _planned(tmp_path, [("a", {})], config)[0].config.reference.directory == "elsewhere"


@pytest.mark.parametrize("slice", ["v6e", "v9x:4x4"])
def test_a_slice_that_there_is_not(slice):
  options = sweep_options()
  options.slice = slice
  with pytest.raises(ValueError, match="set it to a chip and a shape, as 'v6e:4x4'"):
    cluster._needed(options)


def test_what_a_trial_needs_of_a_cluster():
  options = sweep_options()
  options.update(cpus=2.0, tpus=4.0, hosts=3)
  assert cluster._needed(options) == {"CPU": 6, "TPU": 12}
  options.slice = "v5e:4x4"
  assert cluster._needed(options) == {"TPU-v5litepod-16-head": 1}
  options.update(slice="", cpus=0.0, tpus=0.0)
  with pytest.raises(ValueError, match="no resources; set cpus, gpus or tpus above 0"):
    cluster._needed(options)


# ------------------------------------------------------------------ halving


def test_halving_by_hand(tmp_path):
  halving = Halving(tmp_path / "rungs", eta=2, first=10)
  assert halving.goes_on("a", 10, 0.5)  # the best of one
  assert halving.goes_on("b", 10, 0.6)
  assert not halving.goes_on("c", 10, 0.4)  # third of three: two go on
  assert halving.goes_on("c", 15, 0.0)  # no rung
  # Another process knows what this one was told; the next rung is for itself.
  again = Halving(tmp_path / "rungs", eta=2, first=10)
  assert not again.goes_on("d", 10, 0.45)
  assert again.goes_on("a", 20, 0.1) and again.goes_on("b", 40, 0.0)


# ------------------------------------------------------------------ what came of it


def _finished(accuracy):
  low, high = max(0, accuracy - 0.1), min(1, accuracy + 0.1)
  numbers = {"accuracy": accuracy, "low": low, "high": high, "pairs": 50, "shuffled": 0.5}
  return {"status": "finished", "steps": 7, "seconds": 2.0, "attempts": 1, **numbers}


@pytest.fixture
def rows(tmp_path):
  """Two methods by two rates by three seeds; one has failed, one was stopped."""
  trials = [
    (f"{method}-{rate}-{seed}", {"objective.name": method, "objective.beta": rate, "seed": seed})
    for method in ("ica", "pba")
    for rate in (0.1, 0.3)
    for seed in range(3)
  ]
  made = table.read_rows(_planned(tmp_path, trials))
  assert {row.outcome["status"] for row in made} == {"not run"}
  values = [0.6, 0.7, 0.8, 0.6, 0.6, 0.6, 0.9, 0.9, 0.9, 0.5, 0.7, 0.9]
  made = [row._replace(outcome=_finished(x)) for row, x in zip(made, values, strict=True)]
  made[3] = made[3]._replace(outcome={"status": "failed", "reason": "<b>full disk"})
  stopped = {"status": "stopped", "validation_accuracy": 0.4, "steps": 3}
  made[4] = made[4]._replace(outcome=stopped)
  return made


def test_means_and_intervals_by_hand(rows):
  groups = list(table.settings(rows).values())
  mean = table.mean_of(groups[0])
  # 0.6, 0.7, 0.8: deviation 0.1, t of two degrees 4.3027, over √3.
  np.testing.assert_allclose(mean[:3], [0.7, 0.7 - 0.24841, 0.7 + 0.24841], atol=1e-5)
  # One seed: the interval of its pairs. None: nothing.
  assert table.mean_of(groups[1]) == (0.6, 0.5, 0.7, 1)
  assert table.mean_of(rows[3:5]) is None
  assert table.mean_of(groups[1], "shuffled").mean == 0.5
  # Seeds 0, 1, 2 of pba: (0.9 + 0.5) / 2, (0.9 + 0.7) / 2, (0.9 + 0.9) / 2.
  mean, each = table.effects(rows, "objective.name")["pba"]
  np.testing.assert_allclose(mean[:3], [0.8, 0.8 - 0.24841, 1.0], atol=1e-5)
  assert sorted(each) == [0.5, 0.7, 0.9, 0.9, 0.9, 0.9]
  assert table.varied(rows) == ["objective.name", "objective.beta"]


def test_the_printed_table_has_the_best_first_and_every_failure(rows):
  lines = table.as_text(rows).splitlines()
  cells = [cell.strip() for cell in lines[2].split("|")]
  best = ["objective.name pba, objective.beta 0.1", "90.0 [90.0, 90.0]", "50.0", "3"]
  assert cells[1:5] == best
  assert "1 failed, 1 stopped" in lines[-2]
  assert lines[-1].startswith("ica-0.3-0 failed: <b>full disk (see ")


def test_parquet_keeps_every_trial_with_typed_columns(rows, tmp_path):
  table.write_table(tmp_path / "sweep.parquet", rows)
  read = pq.read_table(tmp_path / "sweep.parquet").to_pylist()
  assert len(read) == 12
  assert read[0]["objective.beta"] == 0.1 and read[0]["seed"] == 0
  assert read[0]["accuracy"] == 0.6 and read[0]["steps"] == 7
  assert read[3] | {"status": "failed", "reason": "<b>full disk"} == read[3]
  assert read[3]["accuracy"] is None and read[4]["validation_accuracy"] == 0.4


def test_the_page_is_whole_offline_and_escapes_what_it_is_told(rows, tmp_path):
  pictures.write_page(tmp_path / "sweep.html", rows, title="Sweep", command="python <x>")
  text = (tmp_path / "sweep.html").read_text(encoding="utf-8")
  assert "<b>full disk" not in text and "&lt;b&gt;full disk" in text and "python &lt;x&gt;" in text
  assert not re.search(r"https?://|<script|<link|url\(", text)
  assert text.count('class="trial') == 10 + 5  # lines of the finished, and the key
  assert "12 trials: 10 finished, 1 failed, 1 stopped" in text
  svg = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
  from xml.dom.minidom import parseString

  for picture in svg:
    parseString(picture)
  shares = [float(x) for x in re.findall(r'[xc][12x]?="([\d.]+)%"', text)]
  assert shares and min(shares) >= 0 and max(shares) <= 100


def test_a_page_of_nothing_yet_and_of_many_values(rows, tmp_path):
  none = [row._replace(outcome={"status": "not run"}) for row in rows]
  pictures.write_page(tmp_path / "none.html", none, title="Sweep", command="")
  assert "12 trials: 12 not run." in (tmp_path / "none.html").read_text(encoding="utf-8")
  trials = [(f"t{i}", {"optimizer.learning_rate": 10.0 ** (-i / 4)}) for i in range(12)]
  many = table.read_rows(_planned(tmp_path, trials))
  many = [row._replace(outcome=_finished(0.5 + i / 30)) for i, row in enumerate(many)]
  drawn = pictures.effect_plot(many, "optimizer.learning_rate")
  across = [float(x) for x in re.findall(r'cx="([\d.]+)%"', drawn)]
  # Even steps of the logarithm stand evenly.
  np.testing.assert_allclose(np.abs(np.diff(across)), 92 / 11, atol=0.02)
  assert math.isnan(table.effects(many, "optimizer.learning_rate")[1.0][0].low)


def test_a_number_has_a_curve_for_each_other_setting(rows, tmp_path):
  trials = [
    (f"{method}-{n}-{seed}", {"objective.name": method, "data.train_records": n, "seed": seed})
    for method in ("ica", "pba")
    for n in (80, 160, 320)
    for seed in range(2)
  ]
  made = table.read_rows(_planned(tmp_path, trials))
  made = [row._replace(outcome=_finished(0.5 + i / 30)) for i, row in enumerate(made)]
  drawn = pictures.factor_curves(made, "data.train_records")
  assert (
    re.findall(r"<title>([^:]*):", drawn) == ["objective.name ica"] * 3 + ["objective.name pba"] * 3
  )
  mean = table.mean_of(made[:2])
  assert f"objective.name ica: {100 * mean.mean:.1f} % [{100 * mean.low:.1f}, " in drawn
  assert pictures.factor_curves(made, "objective.name") == ""
  assert pictures.factor_curves(rows, "objective.beta") == ""  # two numbers make no curve
  pictures.write_page(tmp_path / "sweep.html", made, title="Scale", command="")
  assert "Alignment accuracy by data.train_records" in (tmp_path / "sweep.html").read_text("utf-8")
