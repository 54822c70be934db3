"""Many runs from one file: python -m alignx_jax.sweep --sweep=configs/sweeps/X.py --workdir=DIR.

On this computer as many trials at once as fit; with --address=auto on the Ray cluster that it is
part of, with --config.sweep.slice or .tpus one trial a TPU slice. --config.FIELD=… changes the
file's own config. The same command again goes on: what has finished is not repeated. Prints a
table; DIR gets sweep.parquet, sweep.html and a folder for each trial. The exit code is 1 when
trials failed, 75 when it was asked to stop.
"""

import sys

from absl import flags
from ml_collections import config_flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)

flags.DEFINE_alias("sweep", "config")
_ADDRESS = flags.DEFINE_string(
  "address", "", "Of a Ray cluster, 'auto' on its nodes; empty: this computer alone."
)


def main(config, workdir):
  # Imported here, so that --help answers at once.
  from alignx_jax.sweeps import table
  from alignx_jax.sweeps.sweep import run_sweep
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
  command_line.run(main, keep_programs=False)  # trials share those in DIR
