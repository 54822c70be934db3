"""What a description states of age and gender, what it does not, and its counterfactual."""

import pytest

from alignx_jax.personas.demographics import GROUPS, NOT_STATED, has_pronouns, stated, swapped

STATED = [
  # text, gender, age
  ("A 34-year-old woman who likes travel.", "female", "middle-aged"),
  ("The user is a 25-year-old male software engineer in Berlin.", "male", "young"),
  ("An 81 year old retired gentleman.", "male", "older"),
  ("I am a man of few words.", "male", NOT_STATED),
  ("I'm a trans woman, 29 years old.", "female", "young"),
  ("She is an elderly retired lady.", "female", "older"),
  ("He is a middle-aged man; likes cars.", "male", "middle-aged"),
  ("A young adult living with their parents.", NOT_STATED, "young"),
  ("The person is non-binary. They are in their early thirties.", "non-binary", "middle-aged"),
  ("This person is 62 years old.", NOT_STATED, "older"),
  ("Someone of whom friends say: Young, Female, Likes music.", "female", "young"),
  ("Older, High Extraversion, High Openness.", NOT_STATED, "older"),
  ("Gender: Female\nAge: 41\nJob: nurse", "female", "middle-aged"),
  ("A male nurse, aged 29.", "male", "young"),
  ("Someone who is a young woman.", "female", "young"),
  ("is in his 60s.", NOT_STATED, "older"),
]
NOT = [
  "A retired teacher who likes travel and gourmet food.",
  "A mother of a 3-year-old who reads at night.",
  "She loves her husband.",
  "Someone who admires young women and an old man.",
  "Lives with a 70-year-old man and a girl.",
  "A fan of a young man in a band.",
  "An older sister of two.",
  "A woman's rights activist.",
  "A man-made lake enthusiast.",
  "A woman hater.",
  "The user is not a woman.",
  "Emma, a nurse.",
  "Her husband is a 40-year-old man.",
  "Their daughter is 12 years old and his boss is female.",
  "When a young man came by, they left.",
  "He is 6 feet tall.",
  "Likes young adult fiction.",
  "Has a 10 years old car.",
  "A college student.",
  "Someone with age: unknown, gender: unknown.",
  "",
]


@pytest.mark.parametrize("text, gender, age", STATED)
def test_what_is_stated_is_read(text, gender, age):
  assert (stated(text, "gender"), stated(text, "age")) == (gender, age)


@pytest.mark.parametrize("text", NOT)
def test_nothing_is_guessed(text):
  assert (stated(text, "gender"), stated(text, "age")) == (NOT_STATED, NOT_STATED)


def test_statements_that_do_not_agree_state_nothing():
  assert stated("A woman. Gender: male.", "gender") == NOT_STATED
  assert stated("A 20-year-old man, aged 70.", "age") == NOT_STATED


@pytest.mark.parametrize("age, group", [(29, "young"), (30, "middle-aged"), (59, "middle-aged")])
def test_bounds_of_the_ages(age, group):
  assert stated(f"A {age}-year-old person.", "age") == group


def test_ninety_is_older():
  assert stated("Aged 90.", "age") == "older"


@pytest.mark.parametrize(
  "text, attribute, group, expected",
  [
    ("A 34-year-old woman, she sails.", "gender", "male", "A 34-year-old man, she sails."),
    ("A 34-year-old woman.", "age", "young", "A 24-year-old woman."),
    ("An 18-year-old man.", "age", "middle-aged", "A 45-year-old man."),
    ("He is an elderly man.", "age", "young", "He is a young man."),
    ("Young, Female.", "age", "older", "Older, Female."),
    ("Young, Female.", "gender", "male", "Young, Male."),
    ("She is in her 30s.", "age", "older", "She is in her 60s."),
    ("A male nurse, aged 29.", "age", "older", "A male nurse, aged 68."),
  ],
)
def test_a_swap_changes_the_statement_alone(text, attribute, group, expected):
  assert swapped(text, attribute, group) == expected
  other = {"gender": "age", "age": "gender"}[attribute]
  assert stated(expected, attribute) == group
  assert stated(expected, other) == stated(text, other)


@pytest.mark.parametrize("text, gender, age", STATED)
@pytest.mark.parametrize("attribute", GROUPS)
def test_every_swap_states_the_other_group(text, gender, age, attribute):
  before = {"gender": gender, "age": age}[attribute]
  for group in GROUPS[attribute]:
    new = swapped(text, attribute, group)
    if before in (NOT_STATED, group) or "non-binary" in (before, group):
      assert new is None
    else:
      assert stated(new, attribute) == group


def test_pronouns_are_seen():
  assert has_pronouns("A man; she sails.") and not has_pronouns("The shed is theirs.")
