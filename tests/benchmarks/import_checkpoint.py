"""Host memory that reading an 8B checkpoint takes beyond the model itself.

  python tests/benchmarks/import_checkpoint.py --output=import.json

Writes random bfloat16 values in the shape of Llama 3.1 8B, 16 GB in four or five files, to a
temporary directory (--directory says where), reads them in a process of its own on the CPU, and
deletes them. Memory is RssAnon of that process, sampled every 10 ms from outside: what it
allocated, interpreter and JAX included, without pages of the files that the system can drop. The
last line should be at most 1.3. --layers=4 makes it a minute's work.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from alignx_jax.models.hugging_face import ToWrite, make_config, write_directory
from alignx_jax.models.presets import PRESETS
from alignx_jax.models.tensors import expected_tensors

CHILD = """
import sys, time, jax
from alignx_jax.models.pretrained import load_decoder
jax.devices()
started = time.perf_counter()
model = load_decoder(sys.argv[1], param_dtype="bfloat16")
print(time.perf_counter() - started)
"""


def write_checkpoint(directory: Path, layers: int, files: int) -> int:
  """Random weights in about so many files; returns the bytes of all."""
  arch = dataclasses.replace(PRESETS["llama31_8b"], layers=layers)
  rng = np.random.default_rng(0)

  def random(shape):
    # Without the exponent's first bit: any bfloat16 below 2.
    bits = rng.integers(1 << 16, size=shape, dtype=np.uint16) & np.uint16(0xBFFF)
    return bits.view(ml_dtypes.bfloat16)

  tensors = [
    ToWrite(name, 2 * math.prod(shape), lambda shape=shape: random(shape))
    for name, shape in expected_tensors(arch)
  ]
  total = sum(tensor.bytes for tensor in tensors)
  if shutil.disk_usage(directory).free < 1.1 * total:
    sys.exit(f"{directory} has no room for {total / 1e9:.1f} GB; give --directory or --layers.")
  write_directory(
    directory, make_config(arch, "bfloat16"), tensors, file_bytes=math.ceil(total / files)
  )
  return total


def peak_memory(command: list[str]) -> tuple[int, str]:
  """The largest RssAnon of a process in bytes, and what it printed."""
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
  status, peak = Path(f"/proc/{process.pid}/status"), 0
  while process.poll() is None:
    anonymous = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
    if anonymous:  # a process that has just ended has none
      peak = max(peak, 1024 * int(anonymous[0].split()[1]))
    time.sleep(0.01)
  if process.returncode:
    sys.exit(f"Reading failed with exit code {process.returncode}.")
  return peak, process.stdout.read()


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--layers", type=int, default=32)
  parser.add_argument("--files", type=int, default=4)
  parser.add_argument("--directory", type=Path)
  parser.add_argument("--output", type=Path)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=args.directory) as directory:
    directory = Path(directory)
    model = write_checkpoint(directory, args.layers, args.files)
    sizes = [file.stat().st_size for file in directory.glob("*.safetensors")]
    peak, printed = peak_memory([sys.executable, "-c", CHILD, str(directory)])
  result = {
    "layers": args.layers,
    "files": len(sizes),
    "model_bytes": model,
    "largest_file_bytes": max(sizes),
    "peak_anonymous_bytes": peak,
    "seconds": float(printed),
    "beyond_the_model_in_largest_files": (peak - model) / max(sizes),
  }
  for name, value in result.items():
    print(f"{name:<36} {value:>16,.2f}" if isinstance(value, float) else f"{name:<36} {value:>16,}")
  if args.output:
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
