"""A trained run's bias audit: python -m alignx_jax.audit --config=… --workdir=RUN.

Whom the policy serves worse, what it does when only a stated age or gender changes, and what its
P̃ gives away of them, on the test examples of the config. Prints tables; writes bias.json and
bias.html to the workdir.
"""

import sys

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)
_DIMENSION = flags.DEFINE_multi_string(
  "dimension", [], "A pole, such as 'Likes music', whose holders are compared. May be repeated."
)


def main(config, workdir):
  # Imported here, so that --help answers at once.
  from alignx_jax.experiments.audit import run_audit
  from alignx_jax.training import hosts

  hosts.connect()
  command = " ".join(["python -m alignx_jax.audit", *sys.argv[1:]])
  tables = run_audit(config, workdir, dimensions=_DIMENSION.value, command=command)
  if hosts.is_first():
    print(f"{tables}\n\nReport: {workdir / 'bias.html'}")


if __name__ == "__main__":
  command_line.run(main)
