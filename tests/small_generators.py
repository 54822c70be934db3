"""Tiny models that answer, and the same answers computed without a cache."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from alignx_jax.inference.decoding import Generator
from alignx_jax.inference.prompts import Prompt, Sampling
from alignx_jax.models.bridge import LEAST, add_bridge
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.presets import get_architecture
from alignx_jax.training import mesh as meshes

DIMENSIONS = 6
STOP = 7


def small_model(*, bridged: bool = False, preset: str = "tiny8", **sizes) -> Decoder:
  """Random weights, larger than at the start of training, so that tokens differ in probability."""
  arch = dataclasses.replace(get_architecture(preset), **sizes)
  model = Decoder(arch, rngs=nnx.Rngs(0), remat=False)
  state = nnx.state(model)
  leaves, structure = jax.tree.flatten(state)
  rng = np.random.default_rng(1)
  grown = [x + rng.normal(scale=0.15, size=x.shape).astype(np.float32) for x in leaves]
  nnx.update(model, jax.tree.unflatten(structure, grown))
  if bridged:
    add_bridge(model, DIMENSIONS, size=4, rngs=nnx.Rngs(1))
    table = model.bridge.token_PKD
    table[...] = jax.random.normal(jax.random.key(0), table.shape)
  return model


def small_generator(model: Decoder, *, devices: int = 1, rows: int = 4, **options) -> Generator:
  mesh = meshes.make_mesh(options.pop("sizes", None), jax.devices()[:devices])
  options = {"stop_ids": (STOP,)} | options
  return Generator.of(model, nnx.state(model), mesh, rows=rows, **options)


def some_prompts(count: int, *, low: int = 3, high: int = 30, **sampling) -> list[Prompt]:
  rng = np.random.default_rng(0)
  settings = {"temperature": 0.0, "max_new_tokens": 12} | sampling
  return [
    Prompt(rng.integers(8, 300, size=rng.integers(low, high)).tolist(), Sampling(**settings))
    for _ in range(count)
  ]


LENGTH = 64  # of what is recomputed, so that it is compiled once; what comes later is not seen


@functools.cache
def _forward(graph):
  def logits(params, tokens, positions, segments, bridge):
    model = nnx.merge(graph, params)
    return model(tokens, positions, segments, bridge_BTD=bridge) @ model.head.T

  return jax.jit(logits)


def recomputed_logits(model: Decoder, ids, preferences_PK=None) -> np.ndarray:
  """Logits after every token [L, V], by the decoder as it is trained."""
  tokens = np.zeros((1, LENGTH), np.int32)
  tokens[0, : len(ids)] = ids
  positions, segments, bridge = np.arange(LENGTH)[None], np.ones_like(tokens), None
  if preferences_PK is not None:
    bridge = model.bridge.tokens(preferences_PK[None].astype(np.float32))
    is_stated = 1 - preferences_PK[None, :, 1] > LEAST
    positions = np.concatenate([np.zeros((1, DIMENSIONS), int), positions + 1], axis=1)
    segments = np.concatenate([is_stated.astype(int), segments], axis=1)
  graph, params = nnx.split(model)
  logits = _forward(graph)(params, tokens, positions, segments, bridge)
  return np.asarray(logits)[0, -LENGTH:][: len(ids)]


def recomputed_greedy(model: Decoder, prompt: Prompt) -> list[int]:
  """The greedy response, its end with it, each token from a pass over all before it."""
  drawn = []
  while len(drawn) < prompt.sampling.max_new_tokens and STOP not in drawn:
    logits = recomputed_logits(model, [*prompt.ids, *drawn], prompt.preferences_PK)
    drawn.append(int(np.argmax(logits[-1])))
  return drawn


def answers(generator: Generator, prompts) -> list:
  """Generated of each prompt, in order."""
  found = dict(generator.generate(prompts))
  return [found[i] for i in range(len(prompts))]
