"""The picture of a user shows their probabilities, and stands in a page or alone."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from alignx_jax.evaluation import pictures, preference_pictures, results
from alignx_jax.personas.preferences import Dimension, PreferenceSpace, alignx_space

SPACE = PreferenceSpace(
  (
    Dimension("needs", "Strong need for Play (fun)", "Indifferent to Play (no fun)"),
    Dimension("likes", "Likes art", "Dislikes art"),
    Dimension("likes", "Likes law", "Dislikes law"),
    Dimension("needs", "Strong need for Order", "Indifferent to orderliness"),
  )
)
PROBABILITIES = np.array([[0.1, 0.3, 0.6], [0.9, 0.08, 0.02], [0.01, 0.98, 0.01], [0.3, 0.5, 0.2]])
TRUTH = np.array([1, 0.5, 1, np.nan])
BIN = {"predicted": 0.25, "observed": 0.5, "count": 90}
MIDDLE, REACH = 50, preference_pictures.REACH


def parse(picture):
  """The SVG elements of a picture, which must be well-formed."""
  return ElementTree.fromstring(f"<div>{picture}</div>")


def numbers(elements, key):
  return [float(e.get(key).rstrip("%")) for e in elements]


def bars(root, pole):
  return [e for e in root.iter("rect") if pole in e.get("class").split()]


def rows(root):
  """The title of each dimension drawn, from the top."""
  return [e.findtext("title") for e in root.iter("g")]


def test_bars_reach_out_from_the_middle_by_their_probability():
  root = parse(preference_pictures.preference_chart(SPACE, PROBABILITIES))
  shown = [1, 0, 3]  # Art is the most certain, and the group of the others stays together.
  negative, positive = bars(root, "negative"), bars(root, "positive")
  drawn = PROBABILITIES[[1, 0, 3]]
  assert numbers(negative, "width") == pytest.approx(REACH * drawn[:, 0], abs=0.005)
  assert numbers(positive, "width") == pytest.approx(REACH * drawn[:, 2], abs=0.005)
  assert numbers(positive, "x") == [MIDDLE] * 3
  ends = np.add(numbers(negative, "x"), numbers(negative, "width"))
  assert ends == pytest.approx([MIDDLE] * 3, abs=0.01)
  assert numbers(negative, "y") == sorted(numbers(negative, "y")) == numbers(positive, "y")
  for title, i in zip(rows(root), shown, strict=True):
    assert title.startswith(SPACE.dimensions[i].negative)
  assert "90 %; neutral: 8 %; Likes art: 2 %" in rows(root)[0]


def test_only_the_most_certain_are_drawn_under_their_group():
  space = alignx_space()
  probabilities = np.random.default_rng(0).dirichlet([0.3, 1, 0.3], size=len(space))
  root = parse(preference_pictures.preference_chart(space, probabilities, top=12))
  certainty = probabilities[:, [0, 2]].max(1)
  wanted = np.argsort(-certainty)[:12]
  titles = rows(root)
  assert {t.split(": ")[0] for t in titles} == {space.dimensions[i].negative for i in wanted}
  order = [next(i for i in wanted if t.startswith(space.dimensions[i].negative)) for t in titles]
  groups = [space.dimensions[i].group for i in order]
  assert len(set(groups)) == sum(a != b for a, b in zip([None, *groups], groups, strict=False))
  for group in groups:
    within = [certainty[i] for i, g in zip(order, groups, strict=True) if g == group]
    assert within == sorted(within, reverse=True)
  heads = [e.text for e in root.iter("text") if "head" in e.get("class").split()]
  assert heads == [g.replace("_", " ").capitalize() for g in dict.fromkeys(groups)]


def test_rings_stand_where_the_label_is():
  picture = preference_pictures.preference_chart(SPACE, PROBABILITIES, truth_P=TRUTH)
  root = parse(picture)
  rings = [ring for row in root.iter("g") for ring in row.iter("circle")]
  # Art is labelled neutral, play positive, order is unknown.
  assert numbers(rings, "cx") == [MIDDLE, MIDDLE + REACH]
  assert "the record's label: neutral" in rows(root)[0]
  assert preference_pictures.MARK not in rows(root)[2]
  assert "1 of the 2 poles it states" in picture  # Law is not drawn.
  plain = preference_pictures.preference_chart(SPACE, PROBABILITIES)
  assert preference_pictures.MARK not in plain and "circle" not in plain


def test_names_are_short_and_whole_in_the_title():
  root = parse(preference_pictures.preference_chart(SPACE, PROBABILITIES))
  texts = [e.text for e in root.iter("text")]
  assert "Strong need for Play" in texts and not any("(" in t for t in texts)
  assert any("Strong need for Play (fun)" in t for t in rows(root))
  for dimension in alignx_space().dimensions:
    for pole in (dimension.negative, dimension.positive):
      lines = preference_pictures._lines(pole)
      assert " ".join(lines) == pole.split(" (")[0]  # None of AlignX is cut off.
      assert all(len(line) <= preference_pictures.POLE_CHARACTERS for line in lines)
  long = preference_pictures._lines("word " * 40)
  assert len(long) == 3 and long[-1].endswith("…")


def test_nothing_stated_is_said_so(tmp_path):
  neutral = np.tile([0.01, 0.98, 0.01], (4, 1))
  assert "No pole is as probable" in preference_pictures.preference_chart(SPACE, neutral)
  with pytest.raises(ValueError, match="nothing to draw"):
    preference_pictures.write_preference_chart(tmp_path / "user.svg", SPACE, neutral)


def test_all_text_is_escaped(tmp_path):
  evil = "<script>alert('1')</script>\"&"
  space = PreferenceSpace((Dimension(evil, evil + "p", evil + "n"),))
  picture = preference_pictures.preference_chart(space, [[0.9, 0.1, 0.0]], truth_P=[0])
  diagram = preference_pictures.reliability_diagram({evil: [BIN]})
  preference_pictures.write_preference_chart(tmp_path / "a.svg", space, [[0.9, 0.1, 0.0]])
  for text in (picture, diagram, (tmp_path / "a.svg").read_text(encoding="utf-8")):
    assert "<script" not in text and "&lt;script" in text
  assert not list(parse(picture).iter("script"))
  assert parse(diagram).findtext(".//h3") == evil


def test_the_picture_stands_alone(tmp_path):
  path = tmp_path / "new" / "user.svg"
  preference_pictures.write_preference_chart(path, SPACE, PROBABILITIES, truth_P=TRUTH)
  root = ElementTree.parse(path).getroot()
  name = "{http://www.w3.org/2000/svg}"
  assert root.tag == f"{name}svg" and root.get("width") == "720" and root.get("role") == "img"
  assert len(list(root.iter(f"{name}rect"))) == 6
  assert "prefers-color-scheme: dark" in root.findtext(f"{name}style")


@pytest.mark.parametrize(
  "probabilities, truth, message",
  [
    (PROBABILITIES[:3], None, r"give \[4, 3\] and \[4\]"),
    (PROBABILITIES, TRUTH[:3], r"give \[4, 3\] and \[4\]"),
    (100 * PROBABILITIES, None, "not within 0 to 1"),
    (np.full((4, 3), np.nan), None, "not within 0 to 1"),
    (PROBABILITIES, [1, 1, 1, -1], "no direction"),
  ],
)
def test_what_cannot_be_drawn_truthfully_is_refused(probabilities, truth, message):
  with pytest.raises(ValueError, match=message):
    preference_pictures.preference_chart(SPACE, probabilities, truth_P=truth)


def test_a_panel_for_each_group_with_a_dot_for_each_bin():
  groups = {
    "big_five": [BIN, {"predicted": 1.0, "observed": 0.0, "count": 10}],
    "interests": [],
  }
  root = parse(preference_pictures.reliability_diagram(groups))
  assert [e.text for e in root.iter("h3")] == ["Big five", "Interests"]
  panels = list(root.iter("svg"))
  assert [len(list(p.iter("circle"))) for p in panels] == [2, 0]
  diagonal = panels[0].find("line[@class='mark']")
  left, right, bottom, top = (float(diagonal.get(key)) for key in ("x1", "x2", "y1", "y2"))
  large, small = panels[0].iter("circle")
  assert numbers([large], "cx") == pytest.approx([left + 0.25 * (right - left)], abs=0.05)
  assert numbers([large], "cy") == pytest.approx([bottom + 0.5 * (top - bottom)], abs=0.05)
  assert numbers([small], "cx") == [right] and numbers([small], "cy") == [bottom]
  # Area is count.
  assert float(large.get("r")) / float(small.get("r")) == pytest.approx(3, abs=0.05)
  assert large.findtext("title") == "predicted 25 %, observed 50 %, 90 times"


def test_no_bins_is_nothing_measured():
  assert results.EMPTY in preference_pictures.reliability_diagram({"a": [], "b": []})


def test_every_class_has_a_style():
  drawn = preference_pictures.preference_chart(SPACE, PROBABILITIES, truth_P=TRUTH)
  drawn += preference_pictures.reliability_diagram({"a": [BIN]})
  classes = {word for names in re.findall(r'class="([^"]*)"', drawn) for word in names.split()}
  assert all(f".{word}" in pictures.CSS for word in classes)
