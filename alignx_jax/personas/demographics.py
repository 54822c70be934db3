"""Age and gender as a description (DEMO) states them in so many words; all else is not stated.

A statement is read in four places only, so that a word about somebody else does not count:

  who it introduces   "A 34-year-old woman", "The user is an elderly retired man"
  what it predicates  "is 34 years old", "They are male", "She is in her thirties"
  a list item         "Young, Likes music", "female", "aged 34"
  a label             "Age: 34", "gender = female"

Nothing is guessed: a name, a pronoun, a job, a mother, a pensioner state neither. Two statements
that do not agree state nothing.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

NOT_STATED = "not stated"
# In the order of tables. Bounds of the ages: under 30, 30 to 59, 60 and over.
GROUPS = {
  "gender": ("female", "male", "non-binary"),
  "age": ("young", "middle-aged", "older"),
}
_BOUNDS = (30, 60)
_STAND_FOR = {"young": 24, "middle-aged": 45, "older": 68}  # where an age is a number

# A word and what stands in its place when the other is stated: all that a swap knows.
_GENDER_WORDS = {
  "woman": ("female", "man"),
  "female": ("female", "male"),
  "lady": ("female", "gentleman"),
  "girl": ("female", "boy"),
  "man": ("male", "woman"),
  "male": ("male", "female"),
  "gentleman": ("male", "lady"),
  "boy": ("male", "girl"),
  "non-binary": ("non-binary", None),
  "nonbinary": ("non-binary", None),
}
_AGE_WORDS = {
  "teenage": "young",
  "young": "young",
  "twenty-something": "young",
  "middle-aged": "middle-aged",
  "thirty-something": "middle-aged",
  "forty-something": "middle-aged",
  "fifty-something": "middle-aged",
  "older": "older",
  "elderly": "older",
  "teenager": "young",
}
_DECADES = ("teens", "twenties", "thirties", "forties", "fifties", "sixties", "seventies")
_DECADES += ("eighties", "nineties")

# "young" and "older" are of a person's age where they stand beside one of these.
_PEOPLE = "woman|man|female|male|lady|gentleman|girl|boy|person|adult|individual|user|professional"
# A phrase ends where another thing or person may begin.
_ENDS = "of|who|whom|whose|that|which|with|and|or|for|from|to|in|at|on|a|an|the|her|his|my|their|by"
_WORD = r"[\w’'-]+"
_PHRASE = rf"(?:(?!(?:{_ENDS})\b){_WORD}(?:[^\S\n]+|(?=[^\w’'-]|$))){{1,7}}"
_START = r"(?:^|(?<=[.;!?\n]))\s*"
# What is said of the person, not of their husband.
_SUBJECT = r"\b(?:I|he|she|they|user|person|individual|author|poster)"
_IS = rf"(?:(?:{_SUBJECT}\s+|{_START}(?:someone\s+who\s+)?)(?:is|am|are)|{_SUBJECT}['’](?:m|s|re))"
_INTRODUCED = re.compile(rf"(?:{_START}|{_IS}\s+)(?P<phrase>(?:an?\s+|this\s+){_PHRASE})", re.I)
_ITEM = re.compile(r"(?:^|(?<=[,:;.\n(]))\s*(?P<phrase>[^,:;.\n()]+?)\s*(?=[,;.\n)]|$)")
_PREDICATED = re.compile(
  rf"{_IS}\s+(?P<phrase>(?:female|male|non-?binary|young|middle-aged|elderly"
  rf"|\d{{1,3}}(?:\s+years?\s+old)?"
  rf"|in\s+(?:his|her|their|my)\s+(?:(?:early|mid|late)[\s-]+)?(?:\d0s|{'|'.join(_DECADES)})))"
  r"(?=\s*(?:[.,;:!?)\n]|and\b|but\b|$))",
  re.I,
)
_LABELLED = re.compile(rf"\b(?P<label>age|gender|sex)\s*[:=]\s*(?P<phrase>{_WORD})", re.I)
# Within a phrase. A word that owns, or is part of a longer one, is about something else.
_WHOLE = r"(?<![\w’'-])(?:{})(?![\w’'-])"
_GENDER = re.compile(_WHOLE.format("|".join(map(re.escape, _GENDER_WORDS))), re.I)
_AGE_WORD = re.compile(rf"(?:an?\s+)?{_WHOLE.format('|'.join(map(re.escape, _AGE_WORDS)))}", re.I)
_YEARS = re.compile(r"(?:\ban?\s+)?(?<![\w-])(?P<years>\d{1,3})(?=[\s-]+years?[\s-]+old\b)", re.I)
_AGED = re.compile(r"\b(?:aged|age)\s+(?P<years>\d{1,3})\b", re.I)
_DECADE = re.compile(rf"\b(?P<decade>\d0s|{'|'.join(_DECADES)})\b", re.I)


class Statement(NamedTuple):
  """Where a text states an attribute: text[start:end] says `group`.

  Attributes:
    replacement: a group to the text that says it in the same place; None where there is none.
  """

  attribute: str
  group: str
  start: int
  end: int
  replacement: Callable[[str], str | None]


def stated(text: str, attribute: str) -> str:
  """The group of GROUPS[attribute] that a description states, else NOT_STATED."""
  groups = {statement.group for statement in statements(text, attribute)}
  return groups.pop() if len(groups) == 1 else NOT_STATED


def swapped(text: str, attribute: str, group: str) -> str | None:
  """The text with another group stated and every other byte as it was.

  An age may change its article ("an 18-year-old" is "a 45-year-old"). Pronouns are left: see
  `has_pronouns`.

  Returns:
    None where the attribute is not stated, or a statement has no counterpart.
  """
  found = statements(text, attribute)
  if stated(text, attribute) in (NOT_STATED, group):
    return None
  for statement in reversed(found):
    new = statement.replacement(group)
    if new is None:
      return None
    text = text[: statement.start] + new + text[statement.end :]
  return text


def has_pronouns(text: str) -> bool:
  """Whether a text has gendered pronouns, which say something beside a swapped statement."""
  return bool(re.search(r"\b(?:she|hers?|herself|he|his|him|himself)\b", text, re.I))


def statements(text: str, attribute: str) -> list[Statement]:
  """All that a description states of an attribute, in the order of the text; none overlap.

  Raises:
    ValueError: no such attribute.
  """
  if attribute not in GROUPS:
    raise ValueError(f"No demographic {attribute!r}; there are {', '.join(GROUPS)}.")
  read = _genders if attribute == "gender" else _ages
  found = {}
  for pattern, place in (
    (_LABELLED, "label"),
    (_PREDICATED, "predicate"),
    (_INTRODUCED, "introduction"),
    (_ITEM, "item"),
  ):
    for match in pattern.finditer(text):
      label = match.groupdict().get("label", attribute).lower().replace("sex", "gender")
      if label != attribute:
        continue
      start, phrase = match.start("phrase"), match["phrase"]
      for one in read(phrase, place):
        one = one._replace(start=one.start + start, end=one.end + start)
        if all(one.end <= other.start or other.end <= one.start for other in found.values()):
          found[one.start] = one
  return [found[start] for start in sorted(found)]


def _genders(phrase: str, place: str):
  for match in _GENDER.finditer(phrase):
    after = phrase[match.end() :].strip(" ,")
    alone = not after and not phrase[: match.start()].strip()
    if place != "introduction" and not alone:
      continue
    # "A woman hater" is no woman; "a male nurse" is male.
    noun = match[0].lower() in ("woman", "man", "girl", "boy", "lady", "gentleman")
    if noun and after and not re.match(r"aged\b|\w+ing\b|\w+ed\b", after):
      continue
    group, other = _GENDER_WORDS[match[0].lower()]

    def replacement(target, word=match[0], group=group, other=other):
      if target == group:
        return word
      opposite = {"female": "male", "male": "female"}.get(group)
      return _cased_as(word, other) if other and target == opposite else None

    yield Statement("gender", group, match.start(), match.end(), replacement)


def _ages(phrase: str, place: str):
  for match in (*_YEARS.finditer(phrase), *_AGED.finditer(phrase)):
    exact = match.end() == len(phrase.rstrip()) or place != "item"
    of_other = place == "item" and phrase[: match.start()].strip()
    if not of_other and (exact or match.re is _YEARS and _only_years(phrase[match.end() :])):
      yield _age_in_years(match, phrase)
  if place in ("label", "predicate") and re.fullmatch(r"\d{1,3}", phrase):
    yield _age_in_years(re.fullmatch(r"(?P<years>\d{1,3})", phrase), phrase)
  if place == "predicate" or (place == "item" and re.match(r"in\s+(?:his|her|their|my)\b", phrase)):
    for match in _DECADE.finditer(phrase):
      yield from _decade(match)
  for match in _AGE_WORD.finditer(phrase):
    word = re.sub(r"^an?\s+", "", match[0], flags=re.I)
    after = phrase[match.end() :].strip(" ,")
    alone = not after and not phrase[: match.start()].strip(" ,")
    of_person = re.search(rf"(?:^|\s)(?:{_PEOPLE})(?![\w’'-])", after, re.I)
    noun = word.lower() == "teenager" and not after
    if alone or (place == "introduction" and (of_person or noun)):
      yield _age_in_words(match, word)


def _only_years(after: str) -> bool:
  return re.fullmatch(r"[\s-]+years?[\s-]+old", after, re.I) is not None


def _band(years: int) -> str:
  return GROUPS["age"][sum(years >= bound for bound in _BOUNDS)]


def _age_in_years(match, phrase) -> Statement:
  article = re.match(r"an?\s+", match[0], re.I)

  def replacement(target):
    new = str(_STAND_FOR[target])
    if match.re is _AGED:
      return match[0][: match.start("years") - match.start()] + new
    return _cased_as(match[0], f"a {new}") if article else new

  return Statement("age", _band(int(match["years"])), match.start(), match.end(), replacement)


def _decade(match):
  word = match["decade"].lower()
  years = int(word[:2]) if word[0].isdigit() else 10 * (1 + _DECADES.index(word))
  numeric = word[0].isdigit()

  def replacement(target):
    decade = _STAND_FOR[target] // 10
    return f"{decade}0s" if numeric else _cased_as(match[0], _DECADES[decade - 1])

  yield Statement("age", _band(years), match.start(), match.end(), replacement)


def _age_in_words(match, word) -> Statement:
  group = _AGE_WORDS[word.lower()]
  article = re.match(r"an?\s+", match[0], re.I)

  def replacement(target):
    if word.lower() == "teenager":
      return None
    new = ("an " if target == "older" else "a ") + target if article else target
    return _cased_as(match[0], new)

  return Statement("age", group, match.start(), match.end(), replacement)


def _cased_as(old: str, new: str) -> str:
  return new[0].upper() + new[1:] if old[0].isupper() else new
