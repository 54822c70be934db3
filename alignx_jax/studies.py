"""The paper's claims, one a config: what a policy does where something is changed.

  python -m alignx_jax.studies --config=configs/studies/controllability.py --workdir=runs/control

The same command again resumes. Prints a table; writes it as results.json, with a picture and
report.html.
"""

import sys
from importlib.metadata import version

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)


def main(config, workdir):
  # Imported here, so that --help answers at once.
  from alignx_jax.evaluation.pictures import write_svg
  from alignx_jax.evaluation.report import write_report
  from alignx_jax.evaluation.results import write_results
  from alignx_jax.studying import run_study

  found = run_study(config, workdir)
  write_results(workdir / "results.json", found.results)
  write_svg(workdir / f"{config.study.name}.svg", found.pictures[0][1])
  write_report(
    workdir / "report.html",
    title=config.study.name.replace("_", " ").capitalize(),
    summary=found.summary,
    results=found.results,
    curves={},
    config=config,
    command=" ".join(["python -m alignx_jax.studies", *sys.argv[1:]]),
    versions={name: version(name) for name in ("alignx_jax", "jax", "flax", "optax", "grain")},
    pictures=found.pictures,
  )
  print(found.table)
  print(f"\n{found.summary}\nReport: {workdir / 'report.html'}")


if __name__ == "__main__":
  command_line.run(main)
