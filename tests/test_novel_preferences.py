"""Held-out dimensions are held out, and what is saved is as worked out by hand."""

import dataclasses

import numpy as np
import pytest

from alignx_jax.data.splits import simulated_examples
from alignx_jax.evaluation.novel_preferences import dimensions_of, divide, needed, savings
from alignx_jax.personas.persona import Persona, UserComment
from alignx_jax.personas.preferences import alignx_space
from alignx_jax.personas.simulator import SimulatorConfig

SPACE = alignx_space()


def directions(*dimensions):
  directions_P = np.full(90, 0.5, np.float32)
  directions_P[list(dimensions)] = 1
  return directions_P


def test_groups_are_held_out_by_name():
  assert dimensions_of(SPACE, ("big_five", "demographics")) == [2, 3, 4, 5, 6, 0, 1]
  with pytest.raises(ValueError, match="held_out has 'big_six'; there are demographics, big_five"):
    dimensions_of(SPACE, ("big_six",))


def test_nothing_of_a_held_out_dimension_trains(caplog):
  (like,) = simulated_examples(1, split="train", space=SPACE, seed=0)

  def one(pair, *acts):
    comments = tuple(UserComment("Tea?", "note", d) for d in acts)
    return dataclasses.replace(like, persona=Persona(comments), directions=pair)

  known, told_by_history = one(directions(1), directions(2)), one(directions(1), directions(7))
  novel, mixed = one(directions(7, 8), directions(2)), one(directions(1, 7), directions(1))
  unlabelled, in_part = one(None, directions(1)), one(directions(1), None)
  examples = [known, told_by_history, novel, mixed, unlabelled, in_part]
  found = divide(examples, [7, 8])
  assert [[id(e) for e in part] for part in found] == [[id(known)], [id(novel)]]
  assert "4 of 6 examples" in caplog.text


def test_simulated_users_are_divided_as_they_were_drawn():
  held_out = dimensions_of(SPACE, ("murray_needs",))
  kept = tuple(sorted(set(range(90)) - set(held_out)))
  for among, part in ((kept, 0), (tuple(held_out), 1)):
    users = SimulatorConfig(among=among)
    examples = simulated_examples(20, split="train", space=SPACE, seed=0, users=users)
    assert len(divide(examples, held_out)[part]) == 20


def test_the_examples_needed_as_worked_out_by_hand():
  line = {10: 0.5, 100: 0.7, 1000: 0.8}
  assert needed(line, 0.7) == pytest.approx(100)
  assert needed(line, 0.6) == pytest.approx(10**1.5)  # half the way, in the logarithm
  assert needed(line, 0.775) == pytest.approx(10**2.75)
  assert needed(line, 0.4) == 10 and needed(line, 0.81) is None and needed({}, 0.5) is None


def test_a_base_that_never_comes_as_far_is_said_to_need_more():
  found = savings({0: 0.6, 10: 0.6, 100: 0.9}, {0: 0.2, 10: 0.5, 100: 0.6, 1000: 0.8})
  assert list(found) == [10, 100]  # before the first example there is no ratio
  assert found[10] == {
    "accuracy": 0.6,
    "base_needs": pytest.approx(100),
    "ratio": pytest.approx(10),
    "at_least": False,
  }
  assert (found[100]["base_needs"], found[100]["ratio"], found[100]["at_least"]) == (1000, 10, True)
