"""Evaluates a trained workdir, on its test split or on published benchmarks.

  python -m alignx_jax.evaluate --config=configs/X.py --workdir=RUN
  python -m alignx_jax.evaluate --config=configs/X.py --workdir=RUN --benchmarks=p_soups,prism \\
    --benchmark_data=published

Benchmarks (names of alignx_jax/data/alignx.py) are read from --benchmark_data: prepared sets or
published files, as alignx_jax/data/benchmarks.py says. RUN/benchmarks gets a parquet file of every
pair, results.json and report.html; the same command again measures what is missing. No training
data is needed. Instead of the run's policy, --base evaluates the model that the config names, and
--policy_weights=DIR weights from elsewhere, whose reference that model is. What cannot be scored is
printed and counted; the exit code is 2 when a benchmark could not be measured at all.
"""

import sys

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)

_BENCHMARKS = flags.DEFINE_list("benchmarks", [], "Names of benchmarks; none: the test split.")
_DATA = flags.DEFINE_string("benchmark_data", "data", "Directory that holds the benchmarks.")
_BASE = flags.DEFINE_bool("base", False, "On benchmarks: the base model that the config names.")
_POLICY = flags.DEFINE_string(
  "policy_weights", "", "On benchmarks: a policy in Hugging Face format, in place of the run's."
)


def main(config, workdir):
  # Imported here, so that --help answers at once.
  from alignx_jax.experiments import experiment as experiments
  from alignx_jax.experiments.bridges import told_by
  from alignx_jax.experiments.measuring import measure
  from alignx_jax.training import hosts

  hosts.connect()
  if _BENCHMARKS.value:
    _benchmarks(config, workdir)
    return
  if _BASE.value or _POLICY.value:
    raise ValueError("--base and --policy_weights are for benchmarks; give --benchmarks too.")
  experiment = told_by(experiments.load_experiment(config))
  params = experiments.trained_params(experiment, workdir)
  measure(experiment, params, workdir)


def _benchmarks(config, workdir):
  from alignx_jax.experiments.benchmarks import DIRECTORY, format_run, load_subject, run_benchmarks
  from alignx_jax.training import hosts

  if _BASE.value and _POLICY.value:
    raise ValueError("Give --base or --policy_weights, not both.")
  run = None if _BASE.value or _POLICY.value else workdir
  subject = load_subject(config, run, policy_weights=_POLICY.value)
  command = " ".join(["python -m alignx_jax.evaluate", *sys.argv[1:]])
  names = [name.strip() for name in _BENCHMARKS.value]
  results, told = run_benchmarks(subject, workdir, names, _DATA.value, command=command)
  if hosts.is_first():
    print(format_run(results, told))
    print(f"\nPairs: {workdir / DIRECTORY}/*.parquet  Page: {workdir / DIRECTORY / 'report.html'}")
  if {row["benchmark"] for row in results if row["policy"] == subject.name} != set(names):
    sys.exit(2)


if __name__ == "__main__":
  command_line.run(main)
