"""Many runs from one file: python -m alignx_jax.sweep --sweep=configs/sweeps/X.py --workdir=DIR.

On this computer as many trials at once as fit; with --address=auto on the Ray cluster that it is
part of, with --config.sweep.slice or .tpus one trial a TPU slice. --config.FIELD=… changes the
file's own config. The same command again goes on: what has finished is not repeated. Prints a
table; DIR gets sweep.parquet, sweep.html and a folder for each trial. The exit code is 1 when
trials failed, 75 when it was asked to stop.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)

flags.DEFINE_alias("sweep", "config")
_ADDRESS = flags.DEFINE_string(
  "address", "", "Of a Ray cluster, 'auto' on its nodes; empty: this computer alone."
)


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
  # Imported here, so that --help answers at once.
  from absl import logging

  from alignx_jax.sweeps import pictures, plan, running, table
  from alignx_jax.sweeps.options import sweep_options
  from alignx_jax.training.workdir import held

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


def main(config, workdir):
  from alignx_jax.sweeps import table
  from alignx_jax.training.stopping import EXIT_CODE

  path = config_flags.get_config_filename(flags.FLAGS["config"])
  command = " ".join(["python -m alignx_jax.sweep", *sys.argv[1:]])
  try:
    rows = run_sweep(path, config, workdir, address=_ADDRESS.value, command=command)
  except KeyboardInterrupt:
    print("Asked to stop. The same command goes on.", file=sys.stderr)
    sys.exit(EXIT_CODE)
  print(table.as_text(rows))
  print(f"\nTable: {workdir / 'sweep.parquet'}  Page: {workdir / 'sweep.html'}")
  if failed := table.failures(rows):
    sys.exit(f"Error: {len(failed)} of {len(rows)} trials failed; the same command tries again.")


if __name__ == "__main__":
  command_line.run(main)
