"""P̃ in a notebook: the sum of what is read, as in evaluation, and what it makes of responses."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from alignx_jax.data.formatting import tokenise
from alignx_jax.data.rows import lay_out, stack
from alignx_jax.evaluation.calibration import softmax
from alignx_jax.experiments import bridges
from alignx_jax.experiments import experiment as experiments
from alignx_jax.inference import preference_model as programs
from alignx_jax.objectives.log_probs import response_log_probs
from alignx_jax.personas.distribution import Preferences
from alignx_jax.personas.persona import ComparedPair, Persona, UserComment
from alignx_jax.personas.preferences import Dimension, PreferenceSpace
from alignx_jax.preference_model import (
  PreferenceModel,
  infer_preferences,
  infer_preferences_of,
  load_preference_model,
  read_persona,
  score_responses,
)
from configs import base
from tests.small_records import small_record

POST = "what now?"
COMMENTS = tuple(UserComment(f"post {i}", f"tea {'and oak ' * i}") for i in range(4))
PAIR = ComparedPair("rain", "wait for sun", "go out")
PERSONA = Persona(COMMENTS, (PAIR,), "a sailor")
TEA = Dimension("drinks", "Likes tea", "Dislikes tea")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(workdir, experiment, parameters) of two steps; the records are gone."""
  directory = tmp_path_factory.mktemp("head")
  records, workdir = directory / "records.json", directory / "run"
  records.write_text(json.dumps([small_record(i) for i in range(24)]))
  config = base.get_config()
  config.model.weights = "preset:tiny"
  config.model.remat = False
  config.data.path = str(records)
  config.objective.name = "pba"
  config.bridge.kind = "head"
  config.regions.update(prompt=256, response=32, examples=2, persona=256, parts=8)
  config.train.update(rows=2, steps=2, devices=1)
  config.eval.rows = 2
  experiment = experiments.load_experiment(config)
  params = experiments.run_training(experiment, workdir).params
  (workdir / bridges.CALIBRATION).write_text('{"temperature": 1.25}')
  records.unlink()
  return workdir, experiment, params


@pytest.fixture(scope="module")
def model(run):
  """What two steps leave small is made large: evidence, what it says, and what P̃ does."""
  _, experiment, params = run
  scales = {"out_QVK": 50.0, "least": 0.25, "v_DKA": 10.0, "o_HAD": 10.0}

  def scaled(path, x):
    name = jax.tree_util.keystr(path)
    return x * next((scale for part, scale in scales.items() if part in name), 1.0)

  params = jax.tree_util.tree_map_with_path(scaled, params)
  return PreferenceModel.of(experiment, params, temperature=0.8)


@pytest.fixture
def calls(monkeypatch):
  """What every batch of rows was that the decoder read."""
  found = []

  def spied(name):
    make = getattr(programs, name)

    def spy(*args):
      program = make(*args)
      return lambda params, rows: found.append(rows) or program(params, rows)

    monkeypatch.setattr(programs, name, spy)

  spied("read_program")
  spied("score_program")
  return found


def _assert_close(p, q, atol=1e-5):
  np.testing.assert_allclose(p.probabilities_PK, q.probabilities_PK, atol=atol, rtol=0)


def _farthest(p, q):
  return np.abs(p.probabilities_PK - q.probabilities_PK).max()


# ------------------------------------------------------------------ a run from its workdir


def test_what_is_loaded_infers_as_what_was_trained_and_needs_no_data(run):
  workdir, experiment, params = run
  loaded = load_preference_model(workdir)  # on both devices, the run was on one
  trained = PreferenceModel.of(experiment, params, temperature=1.25)
  _assert_close(infer_preferences(loaded, PERSONA, POST), infer_preferences(trained, PERSONA, POST))
  assert loaded.temperature == 1.25


def _copy(run, tmp_path, **changes) -> Path:
  """A workdir without checkpoints, its config with these fields of `bridge` and `data`."""
  copy = tmp_path / "copy"
  shutil.copytree(run[0], copy, ignore=shutil.ignore_patterns("checkpoints", "reference"))
  config = json.loads((copy / "config.json").read_text())
  for name, value in changes.items():
    group, field = name.split("_")
    config[group][field] = value
  (copy / "config.json").write_text(json.dumps(config))
  return copy


def test_a_run_that_is_none_or_has_no_checkpoint_or_head_is_refused(run, tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere holds no run .*; give the workdir"):
    load_preference_model(tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match="has no checkpoint; train there first"):
    load_preference_model(_copy(run, tmp_path / "a"))
  with pytest.raises(
    ValueError, match=r"no run with a learned bridge: .*config.bridge.kind 'head'"
  ):
    load_preference_model(_copy(run, tmp_path / "b", bridge_kind="text"))
  (broken := _copy(run, tmp_path / "c")).joinpath("preference_space.json").unlink()
  with pytest.raises(FileNotFoundError, match="preference_space.json does not exist; train"):
    load_preference_model(broken)


def test_a_head_of_another_space_than_the_one_in_use_is_refused_with_both_names(run, tmp_path):
  space = tmp_path / "mine.json"
  space.write_text(PreferenceSpace((TEA,), "mine").to_json())
  with pytest.raises(ValueError, match=r"The saved head is of .* 'alignx' .* in use is 'mine'"):
    load_preference_model(_copy(run, tmp_path, bridge_space=str(space)))


def test_a_model_without_a_bridge_or_of_another_size_or_temperature_is_refused(run):
  _, experiment, params = run
  plain = dataclasses.replace(experiment, model=experiment.with_objective("ica").model)
  with pytest.raises(ValueError, match="no learned bridge"):
    PreferenceModel.of(plain, params)
  formatting = dataclasses.replace(experiment.formatting, bridge_space=PreferenceSpace((TEA,)))
  with pytest.raises(ValueError, match="90 dimensions and the preference space 'unnamed' has 1"):
    PreferenceModel.of(dataclasses.replace(experiment, formatting=formatting), params)
  with pytest.raises(ValueError, match="temperature is 0"):
    PreferenceModel.of(experiment, params, temperature=0)


# ------------------------------------------------------------------ personas to P̃


def test_inferred_as_evaluation_infers(run, model):
  _, experiment, _ = run
  examples = experiment.test
  logits_XPK = bridges.inferred_logits(experiment, model.params, examples)
  found = infer_preferences_of(model, [e.persona for e in examples], [e.post for e in examples])
  expected = softmax(logits_XPK, model.temperature)
  np.testing.assert_allclose([p.probabilities_PK for p in found], expected, atol=1e-5)
  assert _farthest(found[0], found[1]) > 0.05


def test_the_order_of_acts_is_of_no_matter(model):
  inferred = infer_preferences(model, PERSONA, POST)
  turned = dataclasses.replace(PERSONA, comments=COMMENTS[::-1])
  _assert_close(inferred, infer_preferences(model, turned, POST))
  assert _farthest(inferred, infer_preferences(model, Persona(), POST)) > 0.05


def test_one_by_one_as_at_once_as_the_sum(model):
  inferred = infer_preferences(model, PERSONA, POST)
  known = read_persona(model, Persona())
  for act in ("a sailor", PAIR, *COMMENTS[::-1]):
    known = known.add(act)
  _assert_close(known.preferences(POST), inferred)
  _assert_close(read_persona(model, PERSONA).preferences(POST), inferred)
  one, other = Persona(COMMENTS[:1], (PAIR,)), Persona(COMMENTS[1:], (), "a sailor")
  _assert_close((read_persona(model, one) + read_persona(model, other)).preferences(POST), inferred)


def test_of_a_new_act_nothing_but_the_act_is_read(model, calls):
  known = read_persona(model, PERSONA)
  calls.clear()
  known.add(UserComment("post", "a comment"))
  (rows,) = calls
  text = "Post: post\nComment: a comment"
  ids = model.formatting.tokenizer.encode(text)
  assert rows.tokens_BU.shape == (1, 128) and rows.kinds_BX.shape == (1, 8)
  assert rows.tokens_BU[rows.parts_BU > 0].tolist() == ids
  calls.clear()
  known.preferences(POST)
  (rows,) = calls
  assert (rows.parts_BU > 0).sum() == len(f"Post: {POST}")


def test_a_persona_of_any_length_is_read_whole_in_rows_of_few_sizes(model, calls):
  many = tuple(UserComment(f"post {i}", "sun " * (i % 5)) for i in range(90))
  inferred = infer_preferences(model, Persona(many), POST)
  parts = sum(len(np.unique(row[row > 0])) for rows in calls for row in rows.parts_BU)
  assert parts == 91
  known = read_persona(model, Persona(many[:20])) + read_persona(model, Persona(many[20:]))
  _assert_close(known.preferences(POST), inferred)
  for n in (1, 5, 9, 19):
    read_persona(model, Persona(many[:n]))
  sizes = {(*rows.tokens_BU.shape, rows.kinds_BX.shape[1]) for rows in calls}
  assert len(sizes) < 8
  assert all(size & (size - 1) == 0 for shape in sizes for size in shape)


def test_many_personas_at_once_as_each_alone(model):
  personas = [PERSONA, Persona(), Persona(COMMENTS[1:3])]
  posts = [POST, "", "tea?"]
  together = infer_preferences_of(model, personas, posts)
  for persona, post, inferred in zip(personas, posts, together, strict=True):
    _assert_close(inferred, infer_preferences(model, persona, post))
  for wrong in (posts[:2], POST):
    with pytest.raises(ValueError, match=r"3 personas and \d posts: give a list"):
      infer_preferences_of(model, personas, wrong)


def test_probabilities_sum_to_one_and_without_anything_to_read_are_the_bias(model):
  for inferred in (
    infer_preferences(model, PERSONA, POST),
    infer_preferences(model, Persona(), POST),
    infer_preferences(model, PERSONA),
  ):
    np.testing.assert_allclose(inferred.probabilities_PK.sum(-1), 1)
  bias_PK = np.asarray(model.params["bridge"]["bias_PK"][...])
  nothing = infer_preferences(model, Persona())
  np.testing.assert_allclose(
    nothing.probabilities_PK, softmax(bias_PK, model.temperature), atol=1e-6
  )
  _assert_close(read_persona(model, Persona()).preferences(), nothing)


def test_the_temperature_flattens(model):
  cold, warm = (
    infer_preferences(dataclasses.replace(model, temperature=t), PERSONA, POST) for t in (0.5, 2.0)
  )
  assert (cold.probabilities_PK.max(-1) > warm.probabilities_PK.max(-1)).all()
  assert (cold.probabilities_PK.argmax(-1) == warm.probabilities_PK.argmax(-1)).all()


def test_labels_of_acts_are_not_read(model):
  labelled = [dataclasses.replace(c, directions=np.ones(7)) for c in COMMENTS]
  persona = dataclasses.replace(PERSONA, comments=tuple(labelled))
  _assert_close(
    infer_preferences(model, persona, POST), infer_preferences(model, PERSONA, POST), 1e-7
  )


def test_user_text_is_never_a_special_token(model, calls):
  end = model.formatting.tokenizer.special_ids["<|im_end|>"]
  neutral = Preferences.neutral(model.space)
  infer_preferences(model, Persona((UserComment("<|im_end|>", "<|im_end|>"),)), "<|im_end|>")
  assert (calls[0].parts_BU > 0).any() and not (calls[0].tokens_BU == end).any()
  calls.clear()
  for text in ("hello", "<|im_end|>"):
    score_responses(model, text, [text], neutral)
  plain, special = ((rows.tokens_BL == end).sum() for rows in calls)
  assert plain == special > 0
  plain, special = ((rows.targets_BNR == end).sum() for rows in calls)
  assert plain == special > 0


def test_a_part_longer_than_the_model_was_made_for_is_named(model):
  long = Persona((UserComment("post", "oak " * model.model.arch.max_positions),))
  with pytest.raises(ValueError, match=r"'written' part that begins 'Post: post.*shorten it"):
    infer_preferences(model, long, POST)


def test_what_is_no_act_cannot_be_added(model):
  with pytest.raises(TypeError, match="A dict was to be added; give a UserComment"):
    read_persona(model, PERSONA).add({"comment": "tea"})
  with pytest.raises(ValueError, match="two models"):
    read_persona(model, PERSONA) + read_persona(dataclasses.replace(model), PERSONA)


# ------------------------------------------------------------------ P̃ to responses


def test_responses_score_as_in_packed_rows(run, model):
  _, experiment, _ = run
  formatting = experiment.formatting
  formatting = dataclasses.replace(
    formatting, regions=dataclasses.replace(formatting.regions, persona=0, parts=0)
  )
  examples = experiment.test[:2]
  inferred = infer_preferences_of(model, [e.persona for e in examples], [e.post for e in examples])
  steered = [p.with_preferences({"Likes humor": 0.9}) for p in inferred]
  row = lay_out(
    [tokenise(example, formatting, example.persona) for example in examples],
    formatting.regions,
    indices=range(2),
    dimensions=len(model.space),
    preferences=[p.probabilities_PK for p in steered],
  )
  decoder, rows = nnx.merge(nnx.graphdef(model.model), model.params), stack([row])
  packed_NE = response_log_probs(decoder, rows, rows.preferences_BEPK)[0]
  assert np.abs(packed_NE - response_log_probs(decoder, rows)[0]).max() > 0.02  # P̃ is seen
  for e, example in enumerate(examples):
    scores = score_responses(model, example.post, [example.chosen, example.rejected], steered[e])
    np.testing.assert_allclose(scores, packed_NE[:, e], rtol=1e-5)


def test_each_response_scores_as_it_does_alone_and_preferences_move_it(model):
  neutral, responses = Preferences.neutral(model.space), ["tea", "oak and fog", "sun"]
  together = score_responses(model, POST, responses, neutral)
  alone = [score_responses(model, POST, [response], neutral)[0] for response in responses]
  np.testing.assert_allclose(together, alone, rtol=1e-5)
  steered = Preferences.from_directions(model.space, np.ones(90))
  assert np.abs(score_responses(model, POST, responses, steered) - together).max() > 0.1


def test_neutral_preferences_say_nothing(run, model):
  _, experiment, _ = run
  formatting = experiment.formatting.of_reference()
  example = experiment.test[0]
  row = lay_out([tokenise(example, formatting, example.persona)], formatting.regions, indices=[0])
  decoder = nnx.merge(nnx.graphdef(model.model), model.params)
  unconditioned_N = response_log_probs(decoder, stack([row]))[0, :, 0]
  responses = [example.chosen, example.rejected]
  neutral = Preferences.neutral(model.space)
  scores = score_responses(model, example.post, responses, neutral)
  np.testing.assert_allclose(scores, unconditioned_N, rtol=1e-5)


def test_what_cannot_be_scored_says_what_to_do(model):
  neutral = Preferences.neutral(model.space)
  with pytest.raises(ValueError, match="'Likes humour' is no pole .* Did you mean 'Likes humor'"):
    neutral.with_preferences({"Likes humour": 1.0})
  with pytest.raises(ValueError, match="'mine' .* in use is 'alignx'"):
    score_responses(model, POST, ["tea"], Preferences.neutral(PreferenceSpace((TEA,), "mine")))
  for wrong in ("tea", []):
    with pytest.raises(ValueError, match="a list of one response or more"):
      score_responses(model, POST, wrong, neutral)
  with pytest.raises(ValueError, match="shorten them"):
    score_responses(model, POST, ["oak " * model.model.arch.max_positions], neutral)
