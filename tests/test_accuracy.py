"""Alignment accuracy on hand-made scores, where every outcome can be worked out."""

import dataclasses

import numpy as np
import pytest

import configs.base
from alignx_jax.data.formatting import Formatting, tokenise
from alignx_jax.data.records import Example
from alignx_jax.data.rows import Regions
from alignx_jax.data.tokenizers import load_tokenizer
from alignx_jax.evaluation.accuracy import (
  Scorer,
  bootstrap_interval,
  evaluate_base,
  evaluate_policy,
  few_shot,
  length_control,
  result,
  shuffled,
)
from alignx_jax.experiments.experiment import make_formatting
from alignx_jax.personas.persona import HistoryPolicy, Persona, UserComment
from alignx_jax.personas.preferences import alignx_space

SPACE, TOKENIZER = alignx_space(), load_tokenizer("bytes")


def _example(i, chosen="yes", rejected="no"):
  directions = np.full(90, 0.5, np.float32)
  directions[i] = 1
  persona = Persona(comments=(UserComment("Tea?", f"note {i}", directions),))
  return Example(f"x:{i}", "Tea?", chosen, rejected, persona, directions)


EXAMPLES = [_example(i) for i in range(5)]
FORMATTING = Formatting(
  tokenizer=TOKENIZER,
  space=SPACE,
  regions=Regions(context=700, response=64, examples=2),
  chat="chatml",
  prompt="default",
  condition="persona",
)


def _scorer(examples=EXAMPLES, formatting=FORMATTING, **table):
  """A Scorer whose scores stand in a table: condition to chosen − rejected of each pair."""

  def score(condition, shuffle=False):
    margin = np.asarray(table[("shuffled_" if shuffle else "") + condition], np.float32)
    return np.stack([margin, np.zeros_like(margin)], axis=1)

  scorer = Scorer("fake", None, examples, formatting, rows=1)
  scorer.score = score
  return scorer


class _LogProbs:
  """Scores that are a function of an example's index; of the rejected response the negative."""

  own = slice(None)

  def __init__(self, score):
    self._score = score

  def __call__(self, rows):
    score_BE = self._score(np.maximum(rows.example_BE, 0).astype(np.float32))
    return np.stack([score_BE, -score_BE], axis=2), rows.example_BE


def _accuracies(results):
  return {(r["condition"], r["protocol"]): r["accuracy"] for r in results}


def test_each_protocol_subtracts_its_own_reference():
  policy = _scorer(persona=[1, 1, 1, 1, 0], shuffled_persona=[1, 0, 0, 0, 0], none=[3, 0, 0, 0, 0])
  base = _scorer(persona=[0, 2, 0, 0, 0], shuffled_persona=[2, 0, 0, 0, 0], none=[2, 2, 2, 0, 0])
  assert _accuracies(evaluate_policy("ica", policy, base)) == {
    ("persona", "matched"): 0.6,  # the last is a tie, which is no success
    ("persona", "release"): 0.6,
    ("persona", "unconditioned"): 0.2,
    ("shuffled", "matched"): 0.0,
    ("shuffled", "release"): 0.0,
    ("shuffled", "unconditioned"): 0.0,
    ("none", "matched"): 0.2,
  }


def test_the_release_protocol_scores_the_reference_on_the_raw_persona():
  conditions = {"inferred": [1, 1, 0, 0, 0], "golden": [1, 1, 1, 1, 1], "none": [0] * 5}
  policy = _scorer(shuffled_inferred=[0] * 5, **conditions)
  base = _scorer(
    inferred=[0] * 5,
    golden=[2, 0, 0, 0, 0],
    shuffled_inferred=[0] * 5,
    none=[0] * 5,
    persona=[0, 0, -1, 0, 0],
    shuffled_persona=[-1] * 5,
  )
  found = _accuracies(evaluate_policy("pba", policy, base))
  assert found["inferred", "matched"] == 0.4
  assert found["inferred", "release"] == 0.6
  assert found["golden", "matched"] == 0.8
  assert found["shuffled", "matched"] == 0.0
  assert found["shuffled", "release"] == 1.0


def test_an_untrained_base_is_compared_with_itself_without_the_persona():
  base = _scorer(persona=[1, 2, 0, 0, 0], inferred=[0] * 5, golden=[9] * 5, none=[0, 2, -1, 0, 0])
  results = evaluate_base(base, ["ica", "pba"])
  assert {r["protocol"] for r in results} == {"unconditioned"}
  assert {c: a for (c, _), a in _accuracies(results).items()} == {
    "persona": 0.4,
    "inferred": 0.2,
    "golden": 1.0,
  }


def test_a_policy_without_a_persona_has_one_figure():
  policy, base = _scorer(none=[1, 1, 0, 0, 0]), _scorer(none=[0, 2, 0, -1, 0])
  results = evaluate_policy("dpo", policy, base)
  assert _accuracies(results) == {("none", "matched"): 0.4}
  config = configs.base.get_config()
  config.objective.name = "dpo"
  formatting = make_formatting(config, TOKENIZER, SPACE)
  context = tokenise(EXAMPLES[0], formatting, EXAMPLES[0].persona).context
  assert "note 0" not in TOKENIZER.decode(context) and "Tea?" in TOKENIZER.decode(context)


def test_few_shot_prompting_reads_the_persona_its_pairs_or_anothers_persona():
  base = _scorer()
  table = {
    ("persona",): [1, 1, 1, 0, 0],
    ("persona", False, HistoryPolicy(kinds=("pair",))): [1, 1, 0, 0, 0],
    ("persona", True): [1, 0, 0, 0, 0],
    ("none",): [0] * 5,
  }
  base.score = lambda *key: np.stack([np.float32(table[key]), np.zeros(5)], axis=1)
  found = {(r["policy"], *k): a for r in few_shot(base) for k, a in _accuracies([r]).items()}
  assert found == {
    ("fake", "persona", "unconditioned"): 0.6,
    ("fake", "pairs", "unconditioned"): 0.4,
    ("fake", "shuffled", "unconditioned"): 0.2,
  }


def test_pairs_that_were_refused_are_left_out_and_counted():
  policy = _scorer(persona=[1, np.nan, 1, -1, np.nan], shuffled_persona=[0] * 5, none=[0] * 5)
  base = _scorer(persona=[0, np.nan, 0, 0, 0], shuffled_persona=[0] * 5, none=[0] * 5)
  row = evaluate_policy("ica", policy, base, protocols=["matched"])[0]
  assert (row["accuracy"], row["examples"], row["refused"]) == (2 / 3, 3, 2)


@pytest.mark.parametrize("labelled", [0, 2])
def test_the_golden_row_is_of_the_records_with_labels(labelled):
  examples = [dataclasses.replace(e, directions=None) for e in EXAMPLES[labelled:]]

  scorer = Scorer(
    "zero",
    _LogProbs(lambda example_BE: 0 * example_BE),
    [*EXAMPLES[:labelled], *examples],
    FORMATTING,
    rows=1,
  )
  sizes = {r["condition"]: r["examples"] for r in evaluate_policy("pba", scorer, scorer)}
  golden = {"golden": labelled} if labelled else {}
  assert sizes == {"inferred": 5, "shuffled": 5, "none": 5} | golden


def test_scores_come_back_in_the_order_of_the_examples():
  # The number in the note is what makes the contexts differ.
  examples = [_example(i, "yes " * (i % 3 + 1)) for i in range(20)]
  scores = Scorer(
    "index", _LogProbs(lambda example_BE: example_BE), examples, FORMATTING, rows=2
  ).score("persona")
  np.testing.assert_array_equal(scores, [[i, -i] for i in range(20)])


def test_nobody_keeps_their_own_persona_when_personas_are_shuffled():
  mixed = shuffled(EXAMPLES)
  assert sorted(e.persona.comments[0].comment for e in mixed) == [f"note {i}" for i in range(5)]
  for ours, theirs in zip(EXAMPLES, mixed, strict=True):
    assert (ours.id, ours.post, ours.chosen) == (theirs.id, theirs.post, theirs.chosen)
    assert ours.persona != theirs.persona
    assert theirs.persona.comments[0].directions is theirs.directions


def test_the_length_control_counts_a_tie_as_a_coin_would():
  examples = [_example(0, "long", "s"), _example(1, "s", "long"), _example(2, "same", "size")]
  assert length_control(examples)["accuracy"] == 0.5


def test_one_pair_alone_cannot_be_shuffled():
  with pytest.raises(ValueError, match="two or more"):
    shuffled(EXAMPLES[:1])


def test_without_a_scored_pair_there_is_no_figure():
  with pytest.raises(ValueError, match="None of the 5 test pairs"):
    result("ica", "persona", "matched", EXAMPLES, np.full(5, np.nan))


@pytest.mark.parametrize("share", [0.5, 0.748, 0.95])
def test_the_interval_of_independent_pairs_is_about_the_binomial_one(share):
  correct = (np.arange(1000) < share * 1000).astype(float)
  low, high = bootstrap_interval(correct, range(1000))
  error = 1.96 * np.sqrt(share * (1 - share) / 1000)
  assert low == pytest.approx(share - error, abs=0.004)
  assert high == pytest.approx(share + error, abs=0.004)


def test_pairs_repeated_under_one_post_do_not_narrow_the_interval():
  correct = (np.arange(50) % 4 > 0).astype(float)
  alone = bootstrap_interval(correct, range(50))
  repeated = bootstrap_interval(np.repeat(correct, 7), np.repeat(np.arange(50), 7))
  np.testing.assert_allclose(alone, repeated, atol=0.03)
  low, high = bootstrap_interval(np.repeat(correct, 7), range(350))
  assert high - low < 0.5 * (repeated[1] - repeated[0])
