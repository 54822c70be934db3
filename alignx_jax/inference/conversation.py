"""One person's posts, answered at a terminal as they come."""

import dataclasses
from collections.abc import Iterable

from alignx_jax.data.records import RecordError
from alignx_jax.inference.answering import stats_of
from alignx_jax.inference.persona_judge import Judging
from alignx_jax.inference.prompts import Sampling
from alignx_jax.inference.requests import parse_request


def converse(
  policy,
  persona: dict,
  posts: Iterable[str],
  sampling: Sampling,
  *,
  where: str,
  judging: Judging | None = None,
  judge: dict | None = None,
) -> None:
  """Prints an answer to each post, piece by piece; or why there is none.

  Args:
    policy: experiments.policies.Policy.
    persona: fields of a record.
    sampling: of the first post; each has a seed of its own.
    where: where the persona is from, for messages.
    judging: how Persona-judge answers, which needs
    judge: the second persona.
  """
  space = policy.formatting.space_of_bridge
  extra = {} if judge is None else {"judge": judge}
  for turn, post in enumerate(posts):
    one = dataclasses.replace(sampling, seed=(sampling.seed + turn) % 2**32)
    try:
      request = parse_request(persona | {"prompt": post} | extra, space, where, one)
      if judging is None:
        for piece in policy.stream(request):
          print(piece, end="", flush=True)
      else:
        ((_, judged),) = policy.answer([request], judging=judging)
        if isinstance(judged, RecordError):
          raise judged
        print(policy.text(judged.response.ids), stats_of(judged), end="")
    except RecordError as error:
      print(f"Not answered: {error}", end="")
    print(flush=True)
