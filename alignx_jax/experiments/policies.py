"""A policy that answers: of a run's workdir, or a base model as its config names it."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from alignx_jax.data.formatting import Formatting
from alignx_jax.data.records import RecordError
from alignx_jax.data.tokenizers import Tokenizer
from alignx_jax.experiments import experiment as experiments
from alignx_jax.experiments import loading
from alignx_jax.experiments.config_checks import check_names, has_head, has_latent
from alignx_jax.experiments.preference_model import load_preference_model
from alignx_jax.files import as_path
from alignx_jax.inference.decoding import Generator
from alignx_jax.inference.persona_judge import Judged, Judging, judge
from alignx_jax.inference.preferences import infer_preferences_of
from alignx_jax.inference.prompts import Generated, Prompt
from alignx_jax.inference.requests import Prompter, Request
from alignx_jax.models.decoder import Decoder
from alignx_jax.personas.distribution import Preferences
from alignx_jax.personas.persona import Persona
from alignx_jax.personas.prompts import chat_format, prompt_format
from alignx_jax.training import mesh as meshes
from alignx_jax.training.run_config import run_config


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
  """A model with everything that turns requests into texts.

  Attributes:
    name: what it is, for people.
    key: what it is, for files: other policies have other keys.
  """

  name: str
  key: str
  generator: Generator = dataclasses.field(repr=False)
  prompter: Prompter = dataclasses.field(repr=False)

  @property
  def formatting(self) -> Formatting:
    """How its prompts are made."""
    return self.prompter.formatting

  def answer(
    self, requests: Sequence[Request], *, judging: Judging | None = None
  ) -> Iterator[tuple[int, Generated | Judged | RecordError]]:
    """A response for each request with its index, or at once why there is none.

    Args:
      judging: how Persona-judge answers those that have a second persona, which then all must.
    """
    prompts = self.prompter.prompts(requests)
    others = prompts
    if judging is not None:
      missing = [
        RecordError(request.where, "judge", "is missing; add the second persona, an object.")
        for request in requests
      ]
      judges = [request.judge or request for request in requests]
      others = self.prompter.prompts(judges)
      others = [
        other if request.judge else error
        for other, request, error in zip(others, requests, missing, strict=True)
      ]
    ready = []
    for i, pair in enumerate(zip(prompts, others, strict=True)):
      if errors := [x for x in pair if isinstance(x, RecordError)]:
        yield i, errors[0]
      else:
        ready.append(i)
    if judging is None:
      found = self.generator.generate([prompts[i] for i in ready])
    else:
      found = judge(self.generator, [(prompts[i], others[i]) for i in ready], judging)
    for i, response in found:
      yield ready[i], response

  def text(self, ids: Sequence[int]) -> str:
    """The text of a response's tokens, as the training data has it."""
    before_end = prompt_format(self.formatting.prompt).get("before_end", "")
    return self.formatting.tokenizer.decode(ids).removesuffix(before_end)

  def stream(self, request: Request) -> Iterator[str]:
    """A response, piece by piece, as it is drawn.

    Raises:
      RecordError: the request cannot be answered.
    """
    (prompt,) = self.prompter.prompts([request])
    if isinstance(prompt, RecordError):
      raise prompt
    ids, told = [], ""
    for token in self.generator.stream(prompt, prefix=self._prefix(request, prompt)):
      ids.append(token)
      text = self.text(ids)
      # Of a character only some bytes may be there.
      if not text.endswith("\ufffd"):
        yield text[len(told) :]
        told = text
    if len(text := self.text(ids)) > len(told):
      yield text[len(told) :]

  def _prefix(self, request: Request, prompt: Prompt) -> int:
    """Tokens of a prompt that come before the post."""
    if prompt.group is None or prompt.preferences_PK is not None:
      return 0
    other = dataclasses.replace(request.example, post="\u2026")
    (other,) = self.prompter.prompts([dataclasses.replace(request, example=other)])
    if isinstance(other, RecordError):
      return 0
    pairs = zip(prompt.ids, other.ids, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), 0)


def stop_ids(tokenizer: Tokenizer, chat: str) -> tuple[int, ...]:
  """Tokens that end a response: what training ends it with, and the tokenizer's own end."""
  end = tokenizer.special_ids[chat_format(chat)["end"]]
  return tuple(dict.fromkeys((end, tokenizer.eos_id)))


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
  """A model with its parameters and how it is prompted.

  Attributes:
    of: what it is, for people.
    infer: personas and posts to P̃ by a learned bridge; None without one.
  """

  of: str
  config: object
  model: Decoder
  params: nnx.State = dataclasses.field(repr=False)
  mesh: Mesh
  formatting: Formatting
  infer: Callable[[list[Persona], list[str]], list[Preferences]] | None = None


def load_policy(
  config,
  workdir: str | Path | None,
  *,
  condition: str = "",
  dtype: str = "",
  rows: int = 8,
) -> Policy:
  """A policy that answers, see load_model.

  Args:
    dtype: to compute in, such as "bfloat16", in place of config.model.compute_dtype.
    rows: the most rows of a batch, at least one for each device that rows are split over.
  """
  loaded = load_model(config, workdir, condition=condition)
  formatting, model = loaded.formatting, _computing_in(loaded.model, dtype)
  stops = stop_ids(formatting.tokenizer, formatting.chat)
  vocab = formatting.tokenizer.vocab_size
  generator = Generator.of(
    model, loaded.params, loaded.mesh, stop_ids=stops, vocab=vocab, rows=rows
  )
  threshold = loaded.config.bridge.threshold
  prompter = Prompter(formatting, model.arch.max_positions, loaded.infer, threshold)
  name = f"{loaded.of}, conditioned on: {formatting.condition}"
  key = f"{loaded.of} {formatting.condition} {model.compute_dtype}"
  return Policy(name, key, generator, prompter)


def load_model(config, workdir: str | Path | None, *, condition: str = "") -> Loaded:
  """The newest checkpoint of a run, or the base model that a config names. No data is read.

  Args:
    config: names the base, and for a run what devices to use (mesh, train.devices); else a run is
      what its config.json says.
    workdir: of a run; None for the base.
    condition: what the prompt says of the user, in place of what the policy was trained on
      (data/formatting.py).
  Raises:
    FileNotFoundError, ValueError: what is not there or does not fit, and the field to set.
  """
  if workdir is not None:
    given, config = config, run_config(base=config, workdir=as_path(workdir))
    config.mesh, config.train.devices = given.mesh, given.train.devices
  check_names(config)
  infer = None
  if has_latent(config) and workdir is not None:
    raise ValueError(
      f"{workdir} reads a latent user variable ('vpl'), which only scores responses; give the "
      "--workdir of a run with another objective."
    )
  if has_head(config):
    if workdir is None:
      raise ValueError(
        "A base model has no learned bridge; give the --workdir of a run that has, without --base."
      )
    head = load_preference_model(workdir)
    model, params, mesh, formatting = head.model, head.params, head.mesh, head.formatting
    infer = lambda personas, posts: infer_preferences_of(head, personas, posts)
  else:
    mesh = meshes.make_mesh(config.mesh, jax.devices()[: config.train.devices or None])
    tokenizer, model = loading.load_tokenizer_and_model(
      config, platform=mesh.devices.flat[0].platform
    )
    space = loading.data_space(config)
    config.regions.layout = ""  # prompts are of any length here
    formatting = loading.make_formatting(config, tokenizer, space)
    experiment = experiments.Experiment(
      config, model, mesh, formatting, (), (), (), None if workdir is None else as_path(workdir)
    )
    params = experiment.load_base() if workdir is None else experiments.restored_params(experiment)
    if config.objective.name == "pba" and config.bridge.inferred_by:
      teller = load_preference_model(config.bridge.inferred_by)
      infer = lambda personas, posts: infer_preferences_of(teller, personas, posts)
      formatting = dataclasses.replace(formatting, condition="profile")
    if condition:
      formatting = dataclasses.replace(formatting, condition=condition)
  if condition and formatting.condition != condition:
    raise ValueError("A policy with a learned bridge reads its tokens alone; give no --condition.")
  of = f"the base {config.model.weights}" if workdir is None else str(workdir)
  return Loaded(of, config, model, params, mesh, formatting, infer)


def _computing_in(model, dtype: str):
  if dtype:
    model = nnx.merge(*nnx.split(model))
    model.compute_dtype = jax.numpy.dtype(dtype)
  return model
