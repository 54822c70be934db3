"""Ray underneath a sweep: started here or found, and groups of processes that trials run on."""

import contextlib
import math
import os
from typing import Any

from alignx_jax.sweeps.worker import Worker, interrupt

# What Ray would say and count beside the sweep's own output.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@contextlib.contextmanager
def started(address: str):
  """Ray, of this computer alone or, by its address, of a cluster.

  Raises:
    ImportError: Ray is not installed.
    ValueError: there is no cluster at the address.
  """
  os.environ.update({name: os.environ.get(name, value) for name, value in _QUIET.items()})
  try:
    import ray
  except ImportError as error:
    raise ImportError("A sweep runs on Ray: pip install 'alignx_jax[sweep]'.") from error
  options = {"log_to_driver": False, "logging_level": "ERROR"}
  if not address:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    options |= {"num_cpus": cpus, "include_dashboard": False}
    options["object_store_memory"] = 100 * 2**20  # trials exchange a few numbers
  try:
    ray.init(address=address or "local", **options)
  except (ConnectionError, RuntimeError, ValueError) as error:
    raise ValueError(
      f"Ray cannot be started or found ({' '.join(str(error).split())[:500]}); set --address to "
      "that of a running cluster, 'auto' on one of its nodes, or leave it out."
    ) from error
  try:
    yield
  finally:
    ray.shutdown()


def fitting(options) -> int:
  """How many trials the cluster can run at once, with its resources as they are.

  Args:
    options: config.sweep (options.py).
  Raises:
    ValueError: none; says what a trial asks for and what there is.
  """
  import ray

  total = ray.cluster_resources()
  needed = _needed(options)
  count = min(math.floor(total.get(name, 0) / amount) for name, amount in needed.items())
  if count < 1:
    missing = next(name for name, amount in needed.items() if total.get(name, 0) < amount)
    raise ValueError(
      f"A trial asks for {needed[missing]:g} {missing} and there are {total.get(missing, 0):g} in "
      f"all: set config.sweep, or join a cluster that has them with --address."
    )
  return count


def _needed(options) -> dict[str, float]:
  """Resources of a whole trial."""
  if options.slice:
    from ray.util.tpu import infer_tpu_pod_type_from_topology

    try:
      kind = infer_tpu_pod_type_from_topology(*_topology(options))
      if kind is None:
        raise ValueError("no shape")
      return {f"TPU-{kind}-head": 1}
    except ValueError as error:
      raise ValueError(
        f"config.sweep.slice is {options.slice!r} ({error}); set it to a chip and a shape, as "
        "'v6e:4x4'."
      ) from error
  one = {"CPU": options.cpus, "GPU": options.gpus, "TPU": options.tpus}
  needed = {name: amount * options.hosts for name, amount in one.items() if amount}
  if not needed or options.hosts < 1:
    raise ValueError(
      "config.sweep gives a trial no resources; set cpus, gpus or tpus above 0, and hosts."
    )
  return needed


def _topology(options) -> tuple[str, str]:
  """Shape and chip of config.sweep.slice, as Ray calls them."""
  chip, _, shape = options.slice.partition(":")
  return shape, "v5litepod" if chip == "v5e" else chip


class Gang:
  """The processes that a trial runs on, one a host; they stay for the next trial.

  Raises TimeoutError where a slice is not to be had for long.
  """

  def __init__(self, options, environment: dict[str, str]):
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    self._slice = self._group = None
    hosts, amounts = options.hosts, {"CPU": options.cpus, "GPU": options.gpus, "TPU": options.tpus}
    amounts = {name: amount for name, amount in amounts.items() if amount}
    if options.slice:
      from ray.util.tpu import slice_placement_group

      self._slice = slice_placement_group(
        *_topology(options), chips_per_vm=int(options.tpus) or None
      )
      hosts, amounts = self._slice.num_hosts, dict(self._slice.bundle_resources)
      group = self._slice.placement_group
    elif hosts > 1:
      group = self._group = placement_group([amounts] * hosts, strategy="SPREAD")
    strategy = lambda i: None
    if hosts > 1 or options.slice:
      strategy = lambda i: PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i)
    resources = {name: x for name, x in amounts.items() if name not in ("CPU", "GPU")}
    actor = ray.remote(Worker)
    self._workers = [
      actor.options(
        num_cpus=amounts.get("CPU", 0),
        num_gpus=amounts.get("GPU", 0),
        resources=resources,
        scheduling_strategy=strategy(i),
      ).remote(environment, os.getcwd())
      for i in range(hosts)
    ]
    self._places = [worker.place.remote() for worker in self._workers]
    self._coordinator = self._workers[0].coordinator.remote() if hosts > 1 else ""

  def run(self, trial, control) -> list[Any]:
    """Starts a trial; one reference to its outcome for each process."""
    count = len(self._workers)
    return [
      worker.run.remote(trial, control, self._coordinator, count, i)
      for i, worker in enumerate(self._workers)
    ]

  def interrupt(self) -> None:
    """Asks the processes to save and end their trial."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    came, _ = ray.wait(self._places, num_returns=len(self._places), timeout=0)
    for place in came:
      try:
        place = ray.get(place)
      except ray.exceptions.RayError:  # has died
        continue
      there = NodeAffinitySchedulingStrategy(place["node"], soft=False)
      ask = ray.remote(interrupt).options(num_cpus=0, scheduling_strategy=there)
      ask.remote(place["pid"])

  def end(self) -> None:
    """Ends the processes at once and gives their resources back."""
    import ray
    from ray.util.placement_group import remove_placement_group

    for worker in self._workers:
      ray.kill(worker)
    if self._group is not None:
      remove_placement_group(self._group)
    if self._slice is not None:
      self._slice.shutdown()
