"""All that a notebook does with a trained preference bridge, in one import."""

from alignx_jax.experiments.preference_model import load_preference_model
from alignx_jax.inference.preference_model import PreferenceModel
from alignx_jax.inference.preferences import (
  Known,
  infer_preferences,
  infer_preferences_of,
  read_persona,
  score_responses,
)
from alignx_jax.personas.distribution import Preferences
from alignx_jax.personas.persona import ComparedPair, Persona, UserComment

__all__ = [
  "ComparedPair",
  "Known",
  "Persona",
  "PreferenceModel",
  "Preferences",
  "UserComment",
  "infer_preferences",
  "infer_preferences_of",
  "load_preference_model",
  "read_persona",
  "score_responses",
]
