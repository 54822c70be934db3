"""A policy on published benchmarks: tables, a parquet file of every pair, a page."""

import collections
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from absl import logging
from flax import nnx

from alignx_jax.data.benchmarks import Benchmark, load_benchmark
from alignx_jax.data.loader import Loader
from alignx_jax.data.tokenizers import find_file, load_tokenizer
from alignx_jax.evaluation.accuracy import Comparison, Scorer, compare_base, compare_policy
from alignx_jax.evaluation.published import format_benchmarks
from alignx_jax.evaluation.record_table import (
  make_table,
  read_table,
  summarise,
  unscored_counts,
  write_table,
)
from alignx_jax.evaluation.report import write_benchmark_report
from alignx_jax.evaluation.results import write_results
from alignx_jax.experiments import bridges, loading, measuring
from alignx_jax.experiments import experiment as experiments
from alignx_jax.experiments.config_checks import check_names, check_sizes, has_head
from alignx_jax.experiments.experiment import Experiment
from alignx_jax.files import as_path, write_text
from alignx_jax.personas.preferences import PreferenceSpace, alignx_space
from alignx_jax.training import hosts
from alignx_jax.training.bridge import SPACE
from alignx_jax.training.checksums import array_digest
from alignx_jax.training.reference import cache_key
from alignx_jax.training.run_config import run_config

DIRECTORY = "benchmarks"  # in a workdir
VERSIONS = ("alignx_jax", "jax", "flax", "grain", "pyarrow")


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is evaluated: a policy and its reference, or the reference alone.

  Attributes:
    experiment: of the reference, and of a policy that a run trained; without data.
    policy: the policy's experiment and parameters; None for the base alone.
    workdir: of the run, if there is one.
  """

  experiment: Experiment
  base: nnx.State
  policy: tuple[Experiment, nnx.State] | None = None
  workdir: Path | None = None

  @property
  def name(self) -> str:
    """What the policy is called in results, "base" without one."""
    return measuring.policy_name(self.experiment.config) if self.policy else "base"


def load_subject(config, workdir: Path | None, *, policy_weights: str = "") -> Subject:
  """The policy of a run; or weights from elsewhere as a policy; or the base that a config names.

  No training data is read. A run is what its config.json says; how it is evaluated (eval, regions,
  mesh) the given config says.

  Args:
    workdir: of a run; None for none.
    policy_weights: a policy's weights, as config.model.weights may be; without a run. Its reference
      is config.model.weights, and config.objective says what it reads.
  Raises:
    FileNotFoundError, ValueError: what is not there or does not fit, and the field to set.
  """
  given = config
  if workdir is not None:
    config = run_config(base=given, workdir=workdir)
    config.regions = given.regions
  if config.regions.layout:
    raise ValueError(
      f"config.regions.layout is {config.regions.layout!r}, a proposal for the training data; for "
      "benchmarks empty it, and set config.regions.context, response and examples."
    )
  check_names(config)
  if workdir is None and (has_head(config) or config.bridge.inferred_by):
    raise ValueError(
      "A learned bridge is of a run: give its workdir, without --base or --policy_weights; or set "
      "config.bridge.kind to 'text' and empty config.bridge.inferred_by."
    )
  experiment = _experiment(config, workdir)
  base = experiment.load_base()
  if workdir is not None:
    policy = experiment, experiments.restored_params(experiment)
    return Subject(experiment, base, policy, workdir)
  if not policy_weights:
    return Subject(experiment, base)
  return Subject(experiment, base, _foreign_policy(experiment, policy_weights))


def _experiment(config, workdir: Path | None) -> Experiment:
  """What a config names, without data."""
  mesh = loading.make_mesh(config)
  check_sizes(config, mesh)
  head, space = has_head(config), alignx_space()
  if head:
    space = PreferenceSpace.from_json(workdir / SPACE)
    config.bridge.space = ""  # the run's own copy counts, wherever the file is now
  tokenizer, model = loading.load_tokenizer_and_model(
    config, platform=mesh.devices.flat[0].platform, dimensions=len(space) if head else 0
  )
  formatting = loading.make_formatting(config, tokenizer, space)
  formatting = dataclasses.replace(formatting, bridge_space=space if head else None)
  return Experiment(config, model, mesh, formatting, (), (), (), workdir)


def _foreign_policy(experiment: Experiment, weights: str) -> tuple[Experiment, nnx.State]:
  """A policy of other weights, which reads the very tokens that the base reads.

  Raises:
    ValueError: it was made for other tokens.
  """
  config = experiment.config.copy_and_resolve_references()
  config.model.weights, config.model.preset, config.lora.rank = weights, "", 0
  arch = loading.architecture(config, weights=True)
  tokenizer = experiment.formatting.tokenizer
  other = (
    f"{weights} was made for other tokens than {experiment.config.model.weights}, the reference; "
    "set config.model.weights to the model that it was trained from."
  )
  if arch.vocab_size < tokenizer.vocab_size:
    raise ValueError(f"It embeds {arch.vocab_size} of {tokenizer.vocab_size} tokens: {other}")
  with contextlib.suppress(FileNotFoundError):  # it may have no tokenizer of its own
    own = load_tokenizer(find_file(weights))
    phrases = [pole for d in alignx_space().dimensions for pole in (d.negative, d.positive)]
    if own.encode_batch(phrases) != tokenizer.encode_batch(phrases):
      raise ValueError(other)
  platform = experiment.mesh.devices.flat[0].platform
  model = loading.abstract_model(config, arch, platform=platform)
  policy = dataclasses.replace(experiment, config=config, model=model)
  return policy, policy.load_base()


def run_benchmarks(
  subject: Subject, workdir: Path, names: Sequence[str], directory: str, *, command: str = ""
) -> tuple[list[dict], dict[str, list[str]]]:
  """Evaluates on each benchmark that has not been, with the same subject and data, before.

  Writes to workdir/benchmarks NAME.parquet (record_table.py), NAME.unusable.jsonl of records that
  cannot be read, results.json and report.html.

  Args:
    directory: where the benchmarks are, see data/benchmarks.py.
    command: what reproduces it, for the page.
  Returns:
    Rows of results.json, each with its benchmark; and for each benchmark sentences that say what
    was not scored.
  Raises:
    FileNotFoundError, ValueError: there is no such benchmark; before any is evaluated.
  """
  benchmarks = [load_benchmark(name, directory) for name in dict.fromkeys(names)]
  out = as_path(workdir) / DIRECTORY
  results, told = [], {}
  weights = _weights(subject)
  for benchmark in benchmarks:
    told[benchmark.name] = _unusable_sentences(benchmark)
    if hosts.is_first():
      lines = [json.dumps(dataclasses.asdict(one)) + "\n" for one in benchmark.unusable]
      write_text(out / f"{benchmark.name}.unusable.jsonl", "".join(lines))
    if len(benchmark.examples) < 2:
      told[benchmark.name].append(
        f"{benchmark.name}: {len(benchmark.examples)} usable records; two or more are needed, "
        "so nothing was measured."
      )
      continue
    table = _evaluate(subject, benchmark, out / f"{benchmark.name}.parquet", weights)
    results += summarise(table)
    told[benchmark.name] += _unscored_sentences(table)
  if hosts.is_first():
    write_results(out / "results.json", results)
    write_benchmark_report(
      out / "report.html",
      title=f"Benchmarks: {subject.name}",
      summary=_summary(subject, benchmarks),
      results=results,
      unscored=told,
      config=subject.experiment.config,
      command=command,
      versions={name: version(name) for name in VERSIONS},
    )
  return results, told


def _evaluate(subject: Subject, benchmark: Benchmark, path, weights):
  """The table of a benchmark, from its file if that is of the same subject and data."""
  experiment = _with_examples(subject.experiment, benchmark)
  key = _key(subject, experiment, weights)
  kept = None
  if path.exists():
    try:
      table, about = read_table(path)
      kept = table if about.get("key") == key else None
      if kept is None:
        logging.warning("%s is of another policy, data or settings: measured anew.", path)
    except ValueError as error:
      logging.warning("%s", error)
  if hosts.all_true(kept is not None):
    return kept
  comparisons = _comparisons(subject, benchmark, experiment)
  table = make_table(benchmark.name, benchmark.examples, experiment.formatting, comparisons)
  if hosts.is_first():
    write_table(path, table, {"key": key, "files": benchmark.files, "policy": subject.name})
  return table


def _with_examples(experiment: Experiment, benchmark: Benchmark) -> Experiment:
  """The experiment with a benchmark's records to test on, labelled in their own space."""
  formatting = dataclasses.replace(experiment.formatting, space=benchmark.space)
  return dataclasses.replace(experiment, formatting=formatting, test=benchmark.examples)


def _comparisons(
  subject: Subject, benchmark: Benchmark, experiment: Experiment
) -> Iterator[Comparison]:
  """Of the base, then of the policy; each condition is scored once, whatever the protocols."""
  started = has_head(experiment.config) and experiment.config.bridge.start
  name = "start" if started else "base"
  if subject.policy is None:
    base = measuring.text_scorer(experiment, name, subject.base)
    yield from compare_base(base, ("ica", "pba"))
    return
  experiment = bridges.told_by(experiment)  # another run's head may tell P̃
  base = measuring.text_scorer(experiment, name, subject.base)
  policy = _policy_scorer(subject, benchmark, experiment)
  yield from compare_base(base, (subject.name,))
  protocols = experiment.config.eval.protocols
  yield from compare_policy(subject.name, policy, base, protocols=protocols)


def _policy_scorer(subject: Subject, benchmark: Benchmark, experiment: Experiment):
  own, params = subject.policy
  if subject.workdir is not None:
    return measuring.policy_scorer(experiment, params, subject.workdir)
  scorer: Scorer = measuring.text_scorer(_with_examples(own, benchmark), subject.name, params)
  return scorer


def _weights(subject: Subject) -> str:
  """Stands for all parameters, the base's and the policy's."""
  digests = [array_digest(subject.base)]
  if subject.policy:
    digests.append(array_digest(subject.policy[1]))
    if teller := subject.experiment.config.bridge.inferred_by:
      digests.append(teller)
  return " ".join(digests)


def _key(subject: Subject, experiment: Experiment, weights: str) -> str:
  """A hash of all that a benchmark's table depends on."""
  config = experiment.config
  loader = Loader(experiment.test, experiment.formatting, rows=config.eval.rows)
  text = measuring.text_scorer(experiment, "", subject.base).formatting
  temperature = ""
  if subject.workdir is not None and (path := subject.workdir / bridges.CALIBRATION).exists():
    temperature = path.read_text(encoding="utf-8")
  settings = (
    subject.name,
    cache_key(loader, experiment.model, weights),
    text.regions,
    tuple(config.eval.protocols),
    config.bridge.threshold,
    temperature,
    [example.id for example in experiment.test],
  )
  return hashlib.sha256(repr(settings).encode()).hexdigest()[:32]


# ------------------------------------------------------------------ what was not scored


def _unusable_sentences(benchmark: Benchmark) -> list[str]:
  """How many records of a benchmark cannot be used, by field and reason."""
  counts = collections.Counter((one.field, one.reason) for one in benchmark.unusable)
  first = {(one.field, one.reason): one.where for one in reversed(benchmark.unusable)}
  return [
    f"{benchmark.name}: {count} not usable, the first {first[field, reason]}: "
    + (f"field {field!r} {reason}" if field else reason)
    for (field, reason), count in counts.most_common()
  ]


def _unscored_sentences(table) -> list[str]:
  """How many pairs have no score, by row and reason; protocols that have the same as one."""
  protocols = {}
  for one in unscored_counts(table):
    names = ("benchmark", "policy", "condition", "count", "reason")
    protocols.setdefault(tuple(one[name] for name in names), []).append(one["protocol"])
  return [
    f"{benchmark}: {policy}, {condition}, {'/'.join(same)}: {count} not scored: {reason}"
    for (benchmark, policy, condition, count, reason), same in protocols.items()
  ]


def _summary(subject: Subject, benchmarks: Sequence[Benchmark]) -> str:
  pairs = sum(len(benchmark.examples) for benchmark in benchmarks)
  weights = (subject.policy[0] if subject.policy else subject.experiment).config.model.weights
  of = f"the run {subject.workdir}" if subject.workdir else weights
  return (
    f"{subject.name}, {of}, on {pairs} pairs of {len(benchmarks)} benchmarks; its reference is "
    f"{subject.experiment.config.model.weights}."
  )


def format_run(results: Sequence[dict], told: dict[str, list[str]]) -> str:
  """Tables of results, and what was not scored, for a terminal."""
  sentences = [text for texts in told.values() for text in texts]
  parts = [format_benchmarks(results)] if results else ["nothing measured"]
  return "\n".join(parts + (["", *sentences] if sentences else []))
