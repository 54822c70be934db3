"""Seconds and memory to prepare simulated records of published length, as many as AlignX has.

  python tests/benchmarks/prepare_data.py --output=prepare_data.json

--records takes fewer than all 1,311,622. Memory is that of the process and its workers together,
sampled while they run.
"""

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

from alignx_jax.data.alignx import TRAIN_SOURCES, get_config
from alignx_jax.data.preparing import prepare


def resident_gib() -> float:
  """Resident memory of this process and its children."""
  total, parents = 0, {}
  for path in Path("/proc").iterdir():
    if path.name.isdigit():
      try:
        fields = (path / "stat").read_text().rsplit(") ", 1)[1].split()
      except OSError:
        continue
      parents[int(path.name)] = int(fields[1]), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
  for pid, (_, size) in parents.items():
    ancestor = pid
    while ancestor in parents and ancestor != os.getpid():
      ancestor = parents[ancestor][0]
    total += size if ancestor == os.getpid() else 0
  return total / 2**30


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--records", type=int, default=sum(TRAIN_SOURCES.values()))
  parser.add_argument("--output", type=Path)
  args = parser.parse_args()
  directory = tempfile.mkdtemp()
  samples, finished = [], threading.Event()

  def sample():
    while not finished.wait(5):
      samples.append(resident_gib())

  threading.Thread(target=sample, daemon=True).start()
  started = time.perf_counter()
  card = prepare([], f"{directory}/set", get_config("simulated"), simulated={"train": args.records})
  seconds = time.perf_counter() - started
  finished.set()
  size = sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())
  shutil.rmtree(directory)
  third = max(1, len(samples) // 3)
  result = {
    "records": card["records"],
    "minutes": seconds / 60,
    "records_per_second": card["records"] / seconds,
    "context_median_characters": card["percentiles"]["context"]["50"],
    "gib_on_disk": size / 2**30,
    "resident_gib_most": max(samples, default=0),
    "resident_gib_first_third": sum(samples[:third]) / third,
    "resident_gib_last_third": sum(samples[-third:]) / third,
  }
  for name, value in result.items():
    print(f"{name:<28} {value:>14,.2f}")
  if args.output:
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
