"""Cached decoding: the tokens of the decoder as it is trained, whatever stands beside a row."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from alignx_jax.inference.decoding import Generator
from alignx_jax.inference.kv_cache import bucket, chunk_of
from alignx_jax.inference.prompts import Prompt, Sampling, common_prefixes
from alignx_jax.inference.sampling import logits_of
from alignx_jax.models.lora import add_lora
from alignx_jax.training import mesh as meshes
from tests.small_generators import (
  DIMENSIONS,
  STOP,
  answers,
  recomputed_greedy,
  recomputed_logits,
  small_generator,
  small_model,
  some_prompts,
)


@pytest.fixture(scope="module")
def model():
  return small_model()


@pytest.fixture(scope="module")
def generator(model):
  return small_generator(model)


@pytest.fixture(scope="module")
def greedy(generator):
  """Five prompts and their greedy responses."""
  prompts = some_prompts(5)
  return prompts, answers(generator, prompts)


def test_the_cached_logits_are_those_of_the_decoder_whatever_is_read_at_a_time(model):
  add_lora(adapted := small_model(), rank=2, alpha=4.0, rngs=nnx.Rngs(3))
  factor = adapted.blocks.q_DHA_lora_b
  factor[...] = jax.random.normal(jax.random.key(0), factor.shape)
  ids = np.random.default_rng(3).integers(300, size=21)
  for decoder in (model, adapted):
    reader = (made := small_generator(decoder)).reader
    read = jax.jit(reader.read)
    logits, start = [], 0
    with jax.set_mesh(reader.mesh):
      cache = reader.empty(1, 32)
      for size in (9, 1, 1, 9, 1):
        tokens = ids[None, start : start + size]
        positions = start + np.arange(size)[None]
        x = reader.embed(made.weights, tokens)
        # The start of each row, and one for all.
        at = np.array([start]) if start > 9 else start
        hidden, cache = read(made.weights, cache, x, positions, tokens >= 0, at)
        logits.append(logits_of(hidden, made.weights.head_DV, 320)[0])
        start += size
    np.testing.assert_allclose(
      np.concatenate(logits), recomputed_logits(decoder, ids.tolist()), atol=1e-4
    )


def test_greedy_responses_are_those_of_recomputing(model, greedy):
  for prompt, answer in zip(*greedy, strict=True):
    assert answer.ids + [STOP] * answer.is_ended == recomputed_greedy(model, prompt)
    assert answer.tokens == len(answer.ids) + answer.is_ended


def test_a_response_does_not_depend_on_what_stands_beside_it(generator):
  prompts = some_prompts(7, temperature=1.2, max_new_tokens=20)
  varied = [
    dataclasses.replace(
      prompt,
      sampling=dataclasses.replace(
        prompt.sampling, seed=i, top_k=5 * i, top_p=1 - 0.1 * i, max_new_tokens=20 - i
      ),
    )
    for i, prompt in enumerate(prompts)
  ]
  together = answers(generator, varied)
  assert [answers(generator, [prompt])[0] for prompt in varied] == together
  assert answers(generator, varied[::-1]) == together[::-1]
  assert len({tuple(answer.ids) for answer in together}) == 7


def test_the_seed_alone_tells_responses_to_a_prompt_apart(generator):
  (prompt,) = some_prompts(1, temperature=1.0)
  seeds = (0, 1, 0, 2**32 - 1)
  found = answers(
    generator,
    [Prompt(prompt.ids, dataclasses.replace(prompt.sampling, seed=seed)) for seed in seeds],
  )
  assert found[0] == found[2] and len({tuple(answer.ids) for answer in found}) == 3


def test_a_shared_prefix_is_read_once_and_changes_nothing(model, generator):
  rng = np.random.default_rng(5)
  personas = [rng.integers(8, 300, size=20).tolist() for _ in range(2)]
  prompts = [
    Prompt([*personas[i % 2], *prompt.ids], prompt.sampling, group=f"persona {i % 2}")
    for i, prompt in enumerate(some_prompts(6, high=20))
  ]
  alone = [dataclasses.replace(prompt, group=None) for prompt in prompts]
  assert common_prefixes(alone) == {}
  lengths = common_prefixes(prompts)
  assert set(lengths) == {"persona 0", "persona 1"} and min(lengths.values()) >= 20
  shared = small_generator(model, rows=3)
  read = []
  find = shared._read_prefixes
  counted = lambda groups: read.append(len(groups)) or find(groups)
  object.__setattr__(shared, "_read_prefixes", counted)

  assert answers(shared, prompts) == answers(generator, alone)
  assert read == [1, 1]  # three posts each


def test_one_prompt_that_is_the_beginning_of_another_shares_all_but_its_last_token(generator):
  (long,) = some_prompts(1, low=20, high=21)
  prompts = [Prompt(long.ids[:size], long.sampling, group=1) for size in (12, 20)]
  assert common_prefixes(prompts) == {1: 11}
  alone = [dataclasses.replace(prompt, group=None) for prompt in prompts]
  assert answers(generator, prompts) == answers(generator, alone)


def test_bridge_tokens_enter_as_in_training():
  model = small_model(bridged=True)
  generator = small_generator(model)
  rng = np.random.default_rng(0)
  stated = rng.dirichlet([0.3] * 3, size=(2, DIMENSIONS))
  stated[:, 0] = 0.01, 0.98, 0.01  # as good as neutral: not seen
  prompts = [
    dataclasses.replace(prompt, preferences_PK=stated[i % 2], group=i % 2)
    for i, prompt in enumerate(some_prompts(4))
  ]
  found = answers(generator, prompts)
  for prompt, answer in zip(prompts, found, strict=True):
    assert answer.ids + [STOP] * answer.is_ended == recomputed_greedy(model, prompt)
  swapped = dataclasses.replace(prompts[0], preferences_PK=stated[1], group=None)
  assert answers(generator, [swapped]) != found[:1]
  with pytest.raises(ValueError, match="a learned bridge needs P̃"):
    list(generator.generate(some_prompts(1)))


def test_a_response_ends_at_its_first_end_or_at_the_most_tokens(model, greedy):
  (prompt, *_), (answer, *_) = greedy
  end = answer.ids[4]
  (cut,) = answers(small_generator(model, stop_ids=(end, STOP)), [prompt])
  first = answer.ids.index(end)
  assert (cut.ids, cut.is_ended, cut.tokens) == (answer.ids[:first], True, first + 1)
  short = dataclasses.replace(prompt.sampling, max_new_tokens=3)
  (cut,) = answers(small_generator(model), [Prompt(prompt.ids, short)])
  assert (cut.ids, cut.is_ended, cut.tokens) == (answer.ids[:3], False, 3)


def test_a_stream_is_the_response_token_by_token_with_its_prefix_kept(generator, greedy):
  for prompt, answer in zip(*greedy, strict=True):
    assert list(generator.stream(prompt, prefix=2)) == answer.ids


def test_ids_that_no_tokenizer_has_are_never_drawn(model):
  generator = small_generator(model, vocab=30)
  found = answers(generator, some_prompts(4, temperature=5.0, max_new_tokens=30))
  drawn = [token for answer in found for token in answer.ids]
  assert 20 < max(drawn) < 30


@pytest.mark.parametrize("sizes", [(1, 2, 1, 1), (1, 1, 2, 1)])
def test_a_mesh_of_two_devices_answers_likewise(model, generator, sizes):
  prompts = some_prompts(4, temperature=0.8, seed=3)
  mesh = dict(zip(meshes.AXES, sizes, strict=True))
  split = small_generator(model, devices=2, sizes=mesh)
  assert len(split.weights.layers[0]["q_DHA"][...].sharding.device_set) == 2
  assert answers(split, prompts) == answers(generator, prompts)


def test_what_cannot_be_answered_is_refused(model, generator):
  for change, message in (
    ({"temperature": -0.5}, "temperature is -0.5; give a number, 0, for the most probable"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"top_p": 0}, "top_p is 0; give a number, above 0"),
    ({"top_k": 1.5}, "top_k is 1.5; give a whole number"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"seed": -1}, "seed is -1"),
  ):
    with pytest.raises(ValueError, match=message):
      Sampling(**change)
  with pytest.raises(ValueError, match="8190 tokens and max_new_tokens is 256.* 8192 positions"):
    list(generator.generate([Prompt([9] * 8190)]))
  with pytest.raises(ValueError, match="tokenizer has 400 ids .* embeds 320"):
    small_generator(model, vocab=400)
  for sizes, message in (((1, 1, 1, 2), "config.mesh.context is 2"),):
    with pytest.raises(ValueError, match=message):
      small_generator(model, devices=2, sizes=dict(zip(meshes.AXES, sizes, strict=True)))
  mesh = meshes.make_mesh(None, jax.devices()[:1])
  with pytest.raises(ValueError, match="rows is 0"):
    Generator.of(model, nnx.state(model), mesh, stop_ids=(1,), rows=0)


def test_sizes_are_out_of_a_few():
  sizes = [bucket(n) for n in range(1, 5000)]
  assert all(n <= size < max(2 * n, 33) for n, size in enumerate(sizes, start=1))
  assert len(set(sizes)) == 16
  for size in set(sizes):
    assert size % chunk_of(size) == 0 and min(size, 128) <= chunk_of(size) <= 256
