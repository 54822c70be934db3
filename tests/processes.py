"""Several processes on this machine that act as one run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start_together(arguments, *, processes: int, devices: int) -> list[subprocess.Popen]:
  """Starts `python ARGUMENTS` in so many processes of so many CPU devices each."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  running = []
  for index in range(processes):
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
      "PYTHONPATH": str(ROOT),
    }
    if processes > 1:
      environment |= {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
      }
    running.append(
      subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  return running


def run_together(arguments, *, processes: int, devices: int, timeout: float = 300) -> list[str]:
  """Runs `python ARGUMENTS` in so many processes of so many CPU devices each.

  Returns:
    What each printed to stdout.
  Raises:
    AssertionError: one failed; shows its stderr.
  """
  running = start_together(arguments, processes=processes, devices=devices)
  try:
    ended = [process.communicate(timeout=timeout) for process in running]
  finally:
    for process in running:
      process.kill()
  for process, (_, error) in zip(running, ended, strict=True):
    assert process.returncode == 0, error[-3000:]
  return [output for output, _ in ended]
