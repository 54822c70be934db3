"""Losses weighted by group: worked by hand, off as if not there, the worse group's weight grows."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from alignx_jax.data.groups import count_groups
from alignx_jax.data.records import parse_record
from alignx_jax.data.rows import Regions
from alignx_jax.experiments import experiment as experiments
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import get_architecture
from alignx_jax.objectives.groups import GroupObjective
from alignx_jax.objectives.losses import PreferenceLoss
from alignx_jax.personas.preferences import alignx_space
from alignx_jax.training import mesh as meshes
from alignx_jax.training.metrics import read_metrics
from alignx_jax.training.steps import mean_gradient
from tests.packing import pack
from tests.small_records import small_config, small_record

TWO = GroupObjective(("few", "many"), (0.25, 0.75), step_size=0.5)


def test_an_update_by_hand():
  loss_BE = jnp.array([[2.0, 1.0, 3.0], [5.0, jnp.nan, 7.0]])
  group_BE = jnp.array([[0, 1, 1], [0, -1, -1]])
  weight_BE = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
  q_G = TWO.start()
  np.testing.assert_array_equal(q_G, [0.5, 0.5])
  total, metrics = TWO.loss_sum(loss_BE, group_BE, weight_BE, q_G)
  # Twice the few, 2/3 the many, the last one is in no group.
  np.testing.assert_allclose(total, 2 * (2 + 5) + 2 / 3 * (1 + 3) + 7, rtol=1e-6)
  assert metrics == {"loss/few": (7, 2), "loss/many": (4, 2)}
  # Of five examples 1.25 are of the few on average, 3.75 of the many.
  odds = np.exp(0.5 * (7 / 1.25 - 4 / 3.75))
  new_G = TWO.updated(q_G, metrics | {"loss": (18, 5)})
  np.testing.assert_allclose(new_G, [odds / (1 + odds), 1 / (1 + odds)], rtol=1e-6)


def test_being_rare_does_not_make_a_group_weigh_less():
  # Batches of one example, all with the same loss: in the long run all weigh as at the start.
  objective = GroupObjective(("few", "many"), (0.25, 0.75), step_size=1e-3)

  @jax.jit
  def step(q_G, group_BE):
    _, metrics = objective.loss_sum(jnp.ones((1, 1)), group_BE, jnp.ones((1, 1)), q_G)
    return objective.updated(q_G, metrics | {"loss": (1, 1)})

  q_G = objective.start()
  for group in np.random.default_rng(0).permutation(np.repeat([0, 1], [100, 300])):
    q_G = step(q_G, np.array([[group]]))
  np.testing.assert_allclose(q_G, 0.5, atol=1e-4)


def test_weights_that_are_the_shares_are_the_plain_loss():
  loss_BE, weight_BE = jnp.array([[2.0, 1.0, 3.0]]), jnp.ones((1, 3))
  total, _ = TWO.loss_sum(loss_BE, jnp.array([[0, 1, 1]]), weight_BE, jnp.array([0.25, 0.75]))
  assert total == 6


def test_groups_are_counted():
  records = [small_record(i) | {"Demographic Information": _text(i)} for i in range(12)]
  examples = [parse_record(r, alignx_space(), str(i)) for i, r in enumerate(records)]
  grouping = count_groups(examples, "gender", alignx_space())
  assert (grouping.names, grouping.shares) == (("female", "male"), (0.75, 0.25))
  assert [grouping(example) for example in examples[:4]] == [1, 0, 0, 0]
  unmet = parse_record(small_record(0), alignx_space(), "x")
  assert grouping(unmet) == -1
  by_pole = count_groups(examples, alignx_space().dimensions[3].positive, alignx_space())
  assert "neutral" in by_pole.names and sum(by_pole.shares) == pytest.approx(1)


@pytest.mark.slow
def test_group_losses_are_the_same_split_over_devices_and_parts():
  rng = np.random.default_rng(0)
  ids = lambda n: rng.integers(1, 256, n).tolist()
  rows = [pack([(ids(9), ids(5), ids(3 + i))], Regions(32, 16, 2)) for i in range(4)]
  rows = jax.tree.map(lambda *x: np.concatenate(x), *rows)
  rows = rows._replace(group_BE=np.array([[0, -1], [1, -1], [1, -1], [1, -1]], np.int32))
  graph, params = nnx.split(Decoder(get_architecture("tiny8"), rngs=nnx.Rngs(0)))
  q_G = jnp.array([0.7, 0.3])

  def gradient(devices, accumulation, groups=TWO):
    mesh = meshes.make_mesh(None, jax.devices()[:devices])
    options = {"graph": graph, "loss": PreferenceLoss("simpo", 2.0), "chunk": 64}
    options |= {"accumulation": accumulation, "online": False}
    step = lambda *x: mean_gradient(*x, **options, groups=groups, weights_G=q_G)
    placed = jax.device_put(rows, meshes.rows_sharding(mesh, 4))
    with jax.set_mesh(mesh):
      found, metrics = jax.jit(step)(params, nnx.State({}), placed)
    return jax.device_get((jax.tree.leaves(found), metrics))

  expected, metrics = gradient(1, 1)
  assert metrics["loss/few"][1] == 1 and metrics["loss/many"][1] == 3
  plain, _ = gradient(1, 1, groups=None)
  assert np.abs(expected[0] - plain[0]).max() > 1e-6
  found, again = gradient(2, 2)
  for name in ("loss", "loss/few", "loss/many"):
    np.testing.assert_allclose(again[name], metrics[name], rtol=1e-5)
  for x, y in zip(expected, found, strict=True):
    np.testing.assert_allclose(y, x, atol=1e-5 * (1 + np.abs(x).max()))


def _text(i):
  return "A man." if i % 4 == 0 else "A woman."


def _config(tmp_path, text=_text, **objective):
  """A run on records whose women all prefer the same and whose men, who are few, do not."""
  records = []
  for i in range(48):
    record = small_record(i) | {"Demographic Information": text(i)}
    record |= {"chosen": "sun sun", "rejected": "fog fog"}
    if i % 8 == 0 and text(i) == "A man.":
      record["chosen"], record["rejected"] = record["rejected"], record["chosen"]
    records.append(record)
  (tmp_path / "records.json").write_text(json.dumps(records), encoding="utf-8")
  config = small_config(tmp_path / "records.json")
  config.objective.update(objective)
  config.train.epochs = 3
  return config


@pytest.mark.slow
def test_the_worse_groups_weight_grows_and_is_kept(tmp_path, killed_at):
  config = _config(tmp_path, groups="gender", group_step=0.3)
  run = lambda workdir: experiments.run_training(experiments.load_experiment(config), workdir)
  whole = run(tmp_path / "whole")
  lines = read_metrics(tmp_path / "whole")
  assert lines[0]["weight/male"] == lines[0]["weight/female"] == 0.5
  assert lines[0]["loss/male"] == pytest.approx(np.log(2), abs=1e-6)
  losses = {n: np.nanmean([line[f"loss/{n}"] for line in lines]) for n in ("male", "female")}
  assert losses["male"] > losses["female"]
  assert lines[-1]["weight/male"] > 0.55
  for line in lines:
    assert line["weight/male"] + line["weight/female"] == pytest.approx(1, abs=1e-5)
  with killed_at(5):
    run(tmp_path / "cut")
  resumed = run(tmp_path / "cut")
  assert [line["weight/male"] for line in read_metrics(tmp_path / "cut")] == [
    line["weight/male"] for line in lines
  ]
  for x, y in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_one_group_is_the_plain_loss_bit_by_bit(tmp_path):
  params = []
  for name, objective in (("plain", {}), ("one", {"groups": "gender", "group_step": 1.0})):
    config = _config(tmp_path, text=lambda i: "A woman.", **objective)
    config.train.steps = 3
    params.append(
      experiments.run_training(experiments.load_experiment(config), tmp_path / name).params
    )
  for x, y in zip(*map(jax.tree.leaves, params), strict=True):
    np.testing.assert_array_equal(x, y)


def test_a_step_without_groups_is_refused(tmp_path):
  with pytest.raises(ValueError, match="config.objective.groups to what"):
    experiments.load_experiment(_config(tmp_path, group_step=1.0))
  with pytest.raises(ValueError, match="no pole"):
    config = _config(tmp_path, groups="height")
    experiments.training_loader(experiments.load_experiment(config))
