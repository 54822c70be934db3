"""Trials' processes on a Ray cluster of two make-believe TPU slices: run by test_sweep_runs.py.

Prints, for each of two trials, the slices that its processes are on.
"""

import os

import ray
from ray.cluster_utils import Cluster

from alignx_jax.sweeps import cluster
from alignx_jax.sweeps.options import sweep_options

SMALL = {"object_store_memory": 80 * 2**20}


def main():
  nodes = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **SMALL}
  )
  for name in ("slice0", "slice1"):
    for host in range(2):
      os.environ.update({"TPU_NAME": name, "TPU_WORKER_ID": str(host)})
      labels = {"tpu-slice-name": name, "tpu-worker-id": str(host), "tpu-pod-type": "v6e-8"}
      nodes.add_node(
        num_cpus=2,
        resources={"TPU": 4} | ({} if host else {"TPU-v6e-8-head": 1}),
        labels={f"ray.io/{key}": value for key, value in labels.items()},
        **SMALL,
      )
  ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
  options = sweep_options()
  options.update(slice="v6e:2x4", tpus=4.0)
  names = {node["NodeID"]: node["Labels"].get("ray.io/tpu-slice-name") for node in ray.nodes()}
  gangs = [cluster.Gang(options, {}) for _ in range(cluster.fitting(options))]
  for gang in gangs:
    print(*(names[ray.get(place, timeout=60)["node"]] for place in gang._places))
  ray.shutdown()
  nodes.shutdown()


if __name__ == "__main__":
  main()
