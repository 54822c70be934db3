"""The main job: one base aligned by ICA and by PBA with both bridges, in one report.

  python -m alignx_jax.study --config=configs/study_simulated.py --workdir=runs/study

The same command again resumes. Prints two tables; writes them as JSON, and report.html.
"""

import json
import sys

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)


def main(config, workdir):
  # Imported here, so that --help answers at once.
  from alignx_jax.evaluation.calibration import format_preference_table
  from alignx_jax.evaluation.results import format_table
  from alignx_jax.experiments.study import run_study

  command = " ".join(["python -m alignx_jax.study", *sys.argv[1:]])
  print(format_table(run_study(config, workdir, command=command)))
  if (path := workdir / "preferences.json").exists():
    print(f"\n{format_preference_table(json.loads(path.read_text(encoding='utf-8')))}")
  print(f"\nReport: {workdir / 'report.html'}")


if __name__ == "__main__":
  command_line.run(main)
