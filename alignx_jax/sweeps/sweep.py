"""A sweep from its file to its table and page."""

from pathlib import Path

from absl import logging

from alignx_jax.sweeps import pictures, plan, running, table
from alignx_jax.sweeps.options import sweep_options
from alignx_jax.training.workdir import held


def run_sweep(path, config, workdir: Path, *, address: str = "", command: str = ""):
  """Runs what is left of a sweep, and writes its table and page.

  Args:
    path: of the sweep's file.
    config: its own; with `sweep`, see sweeps/options.py, or by default.
    address: of a Ray cluster; empty for this computer alone.
    command: what reproduces it, for the page.
  Returns:
    sweeps.table.Rows.
  Raises:
    ValueError: what the file, the config or the workdir says cannot be run.
    KeyboardInterrupt: asked to stop.
  """
  trials = plan.make_plan(path, config, workdir)
  plan.check_unchanged(trials, workdir)
  options = sweep_options()
  options.update(config.get("sweep", {}))
  with held(workdir):
    others = plan.save_plan(trials, workdir)
    if others:
      logging.warning(
        "%d trials in %s are no part of this sweep any more: left alone (%s, …).",
        len(others),
        workdir,
        others[0],
      )
    try:
      running.run_trials(trials, options, workdir, address=address)
    finally:
      rows = table.read_rows(trials)
      table.write_table(workdir / "sweep.parquet", rows)
      title = f"Sweep: {Path(path).stem.replace('_', ' ')}"
      pictures.write_page(workdir / "sweep.html", rows, title=title, command=command)
  return rows
