"""Accuracy by what is seen: stand-ins that count what they are shown, worked out by hand."""

import numpy as np

from alignx_jax.data.records import Example
from alignx_jax.data.splits import simulated_examples
from alignx_jax.evaluation import history_length
from alignx_jax.evaluation.accuracy import Scorer
from alignx_jax.evaluation.history_length import by_acts, format_history, history_rows
from alignx_jax.personas.persona import (
  ComparedPair,
  HistoryPolicy,
  Persona,
  UserComment,
  sample_history,
)
from alignx_jax.personas.preferences import alignx_space
from alignx_jax.personas.simulator import SimulatorConfig


def user(i, comments=8, pairs=4):
  persona = Persona(
    (UserComment("Tea?", "yes"),) * comments, (ComparedPair("Tea?", "a", "b"),) * pairs, "a sailor"
  )
  return Example(f"x:{i}", f"post {i}", "yes", "no", persona)


class Needs(Scorer):
  """Right about user i where it sees more than i acts, and no description."""

  def _score(self, condition, shuffle=False, history=HistoryPolicy()):
    shown = [sample_history(e.persona, history, np.random.default_rng(0)) for e in self.examples]
    assert not any(p.description for p in shown) and condition == "persona"
    margin_X = [len(p.history) - i - 0.5 for i, p in enumerate(shown)]
    return np.stack([margin_X, np.zeros(len(margin_X))], axis=1)


class Zero(Scorer):
  def _score(self, *key):
    return np.zeros((len(self.examples), 2))


class OfLabels(Zero):
  """A policy that is told P̃ of labels: of no acts there is none to tell."""

  def _score(self, condition, shuffle=False, history=HistoryPolicy()):
    assert (condition == "none") == (history == HistoryPolicy() or not history.items)
    return super()._score()


def rows_of(examples, acts, kind=Needs, name="ica"):
  policy = kind(name, None, examples, None, rows=1)
  base = Zero("base", None, examples, None, rows=1)
  return history_rows(name, lambda history: policy, base, examples, acts=acts)


def test_each_number_is_measured_on_the_same_users_and_gains_are_from_none():
  rows = rows_of([user(i) for i in range(8)], acts=(0, 1, 2, 4, 8))
  found = {r["condition"]: r["accuracy"] for r in rows}
  counts = {0: 0.0, 1: 1 / 8, 2: 2 / 8, 4: 4 / 8, 8: 1.0}
  expected = {f"{n} {word}": share for n, share in counts.items() for word in ("comments", "acts")}
  expected |= {f"{n} pairs": share for n, share in counts.items() if n <= 4}  # nobody has 8
  assert found == {k: v for k, v in expected.items() if k not in ("0 comments", "0 pairs")}
  assert {r["examples"] for r in rows} == {8}
  assert all(r["change"] == r["accuracy"] for r in rows)
  lines = by_acts(rows, "comments", "acts")
  assert list(lines) == ["ica, comments", "ica, acts"]
  assert {n: r["accuracy"] for n, r in lines["ica, comments"].items()} == counts
  table = format_history(rows).splitlines()
  assert table[0].replace(" ", "") == "|policy|of|0|1|2|4|8|"
  assert table[3].startswith("| ica") and table[3].rstrip(" |").endswith("–")


def test_users_with_too_few_acts_are_left_out_of_every_number():
  examples = [user(0), user(1, comments=2), user(2)]
  rows = rows_of(examples, acts=(1, 8))
  assert [(r["condition"], r["examples"], r["refused"]) for r in rows] == [
    ("1 comments", 2, 1),
    ("8 comments", 2, 1),
    ("1 pairs", 3, 0),
    ("1 acts", 2, 1),
    ("8 acts", 2, 1),
  ]


def test_of_no_acts_there_are_no_labels_to_tell():
  rows = rows_of([user(0), user(1)], acts=(0, 2), kind=OfLabels, name="pba")
  assert [r["condition"] for r in rows] == ["0 acts", "2 comments", "2 pairs", "2 acts"]


def test_more_acts_are_the_fewer_ones_and_others():
  comments = tuple(UserComment("Tea?", str(i)) for i in range(16))
  shown = [
    sample_history(Persona(comments), HistoryPolicy("fixed", n), np.random.default_rng(3)).comments
    for n in (0, 1, 2, 4, 8, 16)
  ]
  for fewer, more in zip(shown, shown[1:], strict=False):
    assert set(fewer) < set(more)
  assert shown[-1] == comments


def test_simulated_users_have_as_many_acts_as_asked_for():
  users = SimulatorConfig(comments=(16, 16), pairs=(16, 16))
  space = alignx_space()
  (example,) = simulated_examples(1, split="test", space=space, seed=0, users=users)
  assert history_length.acts_of(example.persona, ("ugc",)) == 16
  assert history_length.acts_of(example.persona, ("ugc", "pair")) == 32
  plain = simulated_examples(3, split="test", space=space, seed=0)
  assert {len(e.persona.history) for e in plain} <= {3, 4, 5}
