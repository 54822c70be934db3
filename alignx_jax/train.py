"""Trains a policy: python -m alignx_jax.train --config=configs/X.py --workdir=DIR.

The same command again resumes. Afterwards it evaluates on the test split and writes
results.json; --noevaluate leaves that out. Asked to stop (SIGTERM, Ctrl-C) it saves and exits
with code 75; a second time, at once.
"""

from absl import flags

from alignx_jax import command_line

flags.adopt_module_key_flags(command_line)

_EVALUATE = flags.DEFINE_bool("evaluate", True, "Evaluate after training.")
_LOG_TEXT = flags.DEFINE_bool("log_text", False, "Logs show what users wrote, not only ids.")
_REPLAY = flags.DEFINE_string(
  "replay_batch", None, "Instead of training, look at the steps that a replay_*.json is of."
)


def main(config, workdir):
  # Imported here, so that --help answers at once.
  from alignx_jax.experiments import experiment as experiments
  from alignx_jax.experiments.bridges import told_by
  from alignx_jax.experiments.measuring import measure, validation_accuracy
  from alignx_jax.experiments.replay import replay
  from alignx_jax.training import hosts

  hosts.connect(config.train.barrier_seconds)
  if _LOG_TEXT.value:
    config.train.log_text = True
  experiment = told_by(experiments.load_experiment(config))
  if _REPLAY.value:
    print(replay(experiment, workdir, _REPLAY.value))
    return
  evaluate = validation_accuracy(experiment) if config.eval.every else None
  result = experiments.run_training(experiment, workdir, evaluate=evaluate)
  if _EVALUATE.value:
    measure(experiment, result.params, workdir)


if __name__ == "__main__":
  command_line.run(main)
