"""How a sweep is run: config.sweep, beside the config of its trials."""

from ml_collections import ConfigDict


def sweep_options() -> ConfigDict:
  """Every field with its unit and default."""
  options = ConfigDict()
  # Resources of one process of a trial, as Ray counts them; so many trials run at once as fit.
  options.cpus = 1.0
  options.gpus = 0.0
  options.tpus = 0.0  # chips
  # Processes of a trial, each on resources of its own; they act as one (training/hosts.py).
  options.hosts = 1
  # A TPU slice for each trial, such as "v6e:4x4": a process on each of its hosts; empty: none.
  # Where hosts of such a slice may have different numbers of chips, `tpus` says which.
  options.slice = ""
  options.retries = 1  # of a trial that failed, from its checkpoint on
  # Successive halving: at eval.every · halving^k steps only the best 1/halving of the trials that
  # came so far go on; 0: none.
  options.halving = 0
  return options
