"""The paper's claims, one a config: what a policy does where something is changed.

  python -m alignx_jax.studies --config=configs/studies/controllability.py --workdir=runs/control

The same command again resumes. Prints a table; writes it as results.json, with a picture and
report.html.
"""

import sys

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)


def main(config, workdir):
  # Imported here, so that --help answers at once.
  from alignx_jax.experiments.studies import run_study

  command = " ".join(["python -m alignx_jax.studies", *sys.argv[1:]])
  found = run_study(config, workdir, command=command)
  print(f"{found.table}\n\n{found.summary}\nReport: {workdir / 'report.html'}")


if __name__ == "__main__":
  command_line.run(main)
