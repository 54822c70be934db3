"""Properties of the learned bridge itself: who sees what, what adds up, what is learned from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from alignx_jax.data.rows import Personas, Regions, Tokenised, TokenisedPart, lay_out, stack
from alignx_jax.data.tokenizers import load_tokenizer
from alignx_jax.models.bridge import add_bridge, infer, insert, read
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import get_architecture
from alignx_jax.objectives.log_probs import response_log_probs
from alignx_jax.objectives.pba import (
  BridgeObjective,
  balanced_cross_entropy,
  bridged_log_probs,
  class_weights,
)
from alignx_jax.personas.preferences import Dimension, PreferenceSpace
from alignx_jax.training.bridge import start_bridge

P = 6
REGIONS = Regions(context=40, response=24, examples=3, persona=96, parts=12)
SPACE = PreferenceSpace(
  tuple(Dimension("g", f"Likes topic {i}", f"Dislikes topic {i}") for i in range(P)), "six"
)
OBJECTIVE = BridgeObjective(
  label_weight=0.3,
  act_weight=1.0,
  class_weights=(2.0, 0.5, 2.0),
  forcing=(0.0, 0.0),
  forcing_steps=10.0,
  dpo_gradient=True,
  seed=0,
)


@pytest.fixture(scope="module")
def model():
  made = Decoder(get_architecture("tiny"), rngs=nnx.Rngs(0), remat=False)
  add_bridge(made, P, size=16, rngs=nnx.Rngs(1))
  rng = np.random.default_rng(0)
  for name in ("token_PKD", "pole_PQD", "bias_PK"):
    table = getattr(made.bridge, name)
    table[...] = jnp.asarray(rng.normal(size=table.shape), jnp.float32)
  return made


def example(seed, parts=(9, 7, 11)):
  rng = np.random.default_rng(seed)
  ids = lambda size: rng.integers(1, 259, size=size).tolist()
  label = lambda: rng.integers(-1, 3, size=P).astype(np.int8)
  persona = tuple(TokenisedPart(ids(n), int(rng.integers(5)), label()) for n in parts)
  labels = rng.integers(0, 3, size=P).astype(np.int8)
  return Tokenised(ids(10), ids(6), ids(5), persona=persona, labels=labels)


def pack(*rows):
  return stack(
    [lay_out(examples, REGIONS, indices=range(len(examples)), dimensions=P) for examples in rows]
  )


def distribution(seed, rows, examples=3):
  return np.random.default_rng(seed).dirichlet([1, 1, 1], (rows, examples, P)).astype(np.float32)


def test_the_policy_sees_the_bridge_and_never_the_persona(model):
  one, other = example(1), example(2)
  changed = other._replace(context=one.context, chosen=one.chosen, rejected=one.rejected)
  assert [p.ids for p in one.persona] != [p.ids for p in changed.persona]
  given = distribution(0, 1)
  score = jax.jit(lambda rows, given: response_log_probs(model, rows, given, chunk=7))
  np.testing.assert_array_equal(score(pack([one]), given), score(pack([changed]), given))
  # Nor in training, where P̃ is taught: the very numbers.
  taught = dataclasses.replace(OBJECTIVE, forcing=(1.0, 1.0))
  silent = (
    [p._replace(labels=None) for p in one.persona],
    [p._replace(labels=None) for p in changed.persona],
  )
  rows = [
    pack([one._replace(persona=tuple(silent[0]))]),
    pack([changed._replace(persona=tuple(silent[1]), labels=one.labels)]),
  ]
  train = jax.jit(lambda rows: bridged_log_probs(model, rows, taught, 0, chunk=7)[0])
  np.testing.assert_array_equal(train(rows[0]), train(rows[1]))
  # It does see P̃, and in training the persona through P̃ alone.
  assert (
    np.abs(score(pack([one]), given) - score(pack([one]), distribution(1, 1)))[0, :, 0].min() > 1e-4
  )
  free = jax.jit(lambda rows: bridged_log_probs(model, rows, OBJECTIVE, 0, chunk=7)[0])
  assert np.abs(free(rows[0]) - free(rows[1]))[0, :, 0].min() > 1e-5


def test_users_of_a_row_meet_neither_in_the_head_nor_in_the_policy(model):
  users = [example(i) for i in range(3)]
  given = distribution(3, 1)
  infers = jax.jit(lambda personas: infer(model, personas)[0])
  score = jax.jit(lambda rows, given: response_log_probs(model, rows, given, chunk=7))
  together = pack(users)
  inferred, scores = infers(together.personas), score(together, given)
  for i, user in enumerate(users):
    alone = pack([user])
    np.testing.assert_allclose(infers(alone.personas)[0, 0], inferred[0, i], atol=1e-5)
    mine = np.roll(given, -i, axis=1)
    np.testing.assert_allclose(score(alone, mine)[0, :, 0], scores[0, :, i], atol=1e-5)


def test_a_persona_is_a_set_whose_evidence_adds_up(model):
  user = example(5, parts=(5, 9, 4, 12))
  infers = jax.jit(lambda personas: infer(model, personas)[0])
  turned = user._replace(persona=user.persona[::-1])
  whole = infers(pack([user]).personas)[0, 0]
  np.testing.assert_allclose(infers(pack([turned]).personas)[0, 0], whole, atol=1e-5)
  evidence = read(model, pack([user]).personas)
  parts = [jax.tree.map(lambda x, i=i: x[0, i], evidence) for i in range(4)]
  summed = parts[0] + parts[1] + parts[2] + parts[3]
  np.testing.assert_allclose(model.bridge.logits(summed), whole, atol=1e-5)
  # Of no parts at all the head knows what is usual.
  empty = pack([user._replace(persona=())])
  np.testing.assert_allclose(infers(empty.personas)[0, 0], model.bridge.bias_PK[...], atol=1e-6)


def test_tokens_stand_at_one_place_before_the_prompt_and_neutral_ones_are_hidden(model):
  rows = pack([example(1), example(2)])
  given = np.zeros((1, 3, P, 3), np.float32)
  given[..., 1] = 1
  given[0, 1, 2] = [0.1, 0.2, 0.7]
  tokens, positions, segments = insert(model, rows, given)
  T = 3 * P
  assert tokens.shape == (1, T, 32) and not positions[:, :T].any()
  expected = np.zeros(T, int)
  expected[P + 2] = 2  # what the second user prefers, and nothing else
  np.testing.assert_array_equal(segments[0, :T], expected)
  table = model.bridge.token_PKD[...]
  by_hand = 0.1 * table[2, 0] + 0.2 * table[2, 1] + 0.7 * table[2, 2]
  np.testing.assert_allclose(tokens[0, P + 2], by_hand, rtol=1e-5)
  real = rows.segments_BL > 0
  np.testing.assert_array_equal(positions[:, T:][real], rows.positions_BL[real] + 1)


def test_tables_start_from_the_phrases_and_from_how_frequent_directions_are(model):
  tokenizer = load_tokenizer("bytes")
  params = jax.device_put(nnx.state(model), jax.sharding.NamedSharding(_mesh(), jax.P()))
  labels_XP = np.array([[0, 1, 1, 1, 2, -1], [1, 1, 1, 1, 1, 2]])
  started = start_bridge(params, SPACE, tokenizer, labels_XP)["bridge"]
  embedding = np.asarray(model.embedding_VD[...])
  for index, dimension in enumerate(SPACE.dimensions):
    for k, pole in ((0, dimension.negative), (2, dimension.positive)):
      by_hand = embedding[tokenizer.encode(pole)].mean(axis=0)
      np.testing.assert_allclose(started["token_PKD"][...][index, k], by_hand, atol=1e-6)
      np.testing.assert_allclose(started["pole_PQD"][...][index, k // 2], by_hand, atol=1e-6)
  assert not started["token_PKD"][...][:, 1].any()
  # One of each is counted beside: 2, 9 and 3 of 14.
  np.testing.assert_allclose(
    np.exp(started["bias_PK"][...][0]), np.array([2, 9, 3]) / 14, rtol=1e-5
  )


def _mesh():
  return jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))


def test_class_balance_by_hand_and_that_its_optimum_is_calibrated():
  labels_XP = np.array([[1] * 7 + [0, 2, -1]])  # with one of each beside: 2, 8, 2 of 12
  weights = np.array(class_weights(labels_XP, 1.0))
  np.testing.assert_allclose(weights, [2.0, 0.5, 2.0])  # 1/share, 1 on average over labels
  np.testing.assert_allclose(class_weights(labels_XP, 0.0), [1, 1, 1])
  # q ∝ w p with p = (1/2, 1/4, 1/4), w = (2, 1/2, 2): (8, 1, 4) / 13, of label 2 with weight 2.
  logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
  loss = balanced_cross_entropy(logits, jnp.array([2]), (2.0, 0.5, 2.0))
  np.testing.assert_allclose(loss, 2 * np.log(13 / 4), rtol=1e-6)
  assert balanced_cross_entropy(logits, jnp.array([-1]), (2.0, 0.5, 2.0)) == 0
  # Where directions come as p says, the gradient is nothing at softmax(logits) = p.
  p = jnp.array([0.1, 0.7, 0.2])
  expected = lambda logits: sum(
    p[k] * balanced_cross_entropy(logits[None], jnp.array([k]), (2.0, 0.5, 2.0)) for k in range(3)
  )
  np.testing.assert_allclose(jax.grad(expected)(jnp.log(p)), 0, atol=1e-6)


@pytest.mark.parametrize("on", [True, False])
def test_the_dpo_gradient_reaches_the_head_only_if_it_may(model, on):
  objective = dataclasses.replace(OBJECTIVE, dpo_gradient=on)
  graph, params = nnx.split(model)
  rows = pack([example(1), example(2)])

  def chosen(params):
    log_probs, _, _ = bridged_log_probs(nnx.merge(graph, params), rows, objective, 0, chunk=7)
    return log_probs[:, 0].sum()

  gradient = jax.jit(jax.grad(chosen))(params)["bridge"]
  reaches = {name: float(jnp.abs(leaf[...]).max()) > 0 for name, leaf in gradient.items()}
  assert reaches.pop("token_PKD")  # the policy's side learns in any case
  assert set(reaches.values()) == {on}


def test_teacher_forcing_follows_its_schedule_whatever_row_an_example_is_in(model):
  objective = dataclasses.replace(OBJECTIVE, forcing=(1.0, 0.25))
  users = [example(i) for i in range(24)]
  rows = stack(
    [
      lay_out(users[i : i + 3], REGIONS, indices=range(i, i + 3), dimensions=P)
      for i in range(0, 24, 3)
    ]
  )
  forced = jax.jit(lambda rows, step: bridged_log_probs(model, rows, objective, step, chunk=7))

  def share(rows, step):
    numerator, denominator = forced(rows, step)[2]["forced"]
    return float(numerator / denominator)

  assert share(rows, 0) == 1.0
  late = np.mean([share(rows, step) for step in range(10, 40)])
  assert abs(late - 0.25) < 0.06
  assert 0.3 < share(rows, 5) < 0.95
  # The same examples are taught in whichever order their rows come.
  turned = jax.tree.map(lambda x: x[::-1], rows)
  np.testing.assert_allclose(forced(rows, 7)[0][::-1], forced(turned, 7)[0], atol=1e-5)


def test_what_is_taught_are_the_labels_of_the_acts_and_of_the_record_which_counts_most(model):
  objective = dataclasses.replace(OBJECTIVE, forcing=(1.0, 1.0))
  acts = [np.array(x, np.int8) for x in ([2, 0, 1, 2, 1, -1], [2, 2, 1, 2, 1, -1])]
  labels = np.array([1, 1, 1, 0, 2, 1], np.int8)
  user = example(1, parts=(5, 6))
  parts = tuple(p._replace(labels=act) for p, act in zip(user.persona, acts, strict=True))
  rows = pack([user._replace(persona=parts, labels=labels)])
  # By hand: both acts say 2; they disagree; neutral; the record's 0 against two; the record's 2.
  together = np.array([2, 1, 1, 0, 2, 1])
  given = np.zeros((1, 3, P, 3), np.float32)
  given[0, 0] = np.eye(3)[together]
  taught = bridged_log_probs(model, rows, objective, 0, chunk=7)[0]
  expected = response_log_probs(model, rows, given, chunk=7)
  np.testing.assert_allclose(taught[0, :, 0], expected[0, :, 0], atol=1e-5)


def test_rows_hold_what_personas_say(model):
  users = [example(1, parts=(4, 3)), example(2, parts=(5,))._replace(labels=None)]
  personas = pack(users).personas
  assert isinstance(personas, Personas)
  np.testing.assert_array_equal(personas.parts_BU[0, :13], [1] * 4 + [2] * 3 + [3] * 5 + [0])
  np.testing.assert_array_equal(personas.positions_BU[0, :12], [*range(4), *range(3), *range(5)])
  np.testing.assert_array_equal(personas.segments_BX[0, :4], [1, 1, 2, 0])
  np.testing.assert_array_equal(personas.labels_BEP[0, 0], users[0].labels)
  assert (personas.labels_BEP[0, 1:] == -1).all() and (personas.acts_BXP[0, 3:] == -1).all()
