"""The report says exactly what was measured, and is a page a browser can trust."""

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from alignx_jax.evaluation import pictures, report, results

VOID = {"meta", "br", "hr", "img", "link", "input"}


def result(policy="ica", condition="persona", protocol="matched", accuracy=0.862, **more):
  interval = {"low": accuracy - 0.031, "high": accuracy + 0.028}
  return {
    "policy": policy,
    "condition": condition,
    "protocol": protocol,
    "accuracy": accuracy,
    **interval,
    "examples": 512,
    **more,
  }


RESULTS = [
  result("base", accuracy=0.5031),
  result("ica", accuracy=0.862),
  result("ica", "shuffled", accuracy=0.5469, unknown_key="ignored"),
  result("pba", "inferred", "release", accuracy=0.8313),
  result("length", "length", accuracy=0.748),
]
CURVES = {
  run: [
    {"step": i, "loss": math.log(2) - 0.004 * i, "reward_accuracy": 0.5, "margin": 0.01 * i}
    for i in range(steps)
  ]
  for run, steps in (("ica", 60), ("a long run", 5000), ("one point", 1))
}


class Page(HTMLParser):
  """Every element as (tag, attributes, own text); fails on an unbalanced tag."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.stack = [], []
    self.feed(text)
    self.close()
    assert not self.stack

  def handle_starttag(self, tag, attrs):
    self.elements.append([tag, dict(attrs), ""])
    if tag not in VOID:
      self.stack.append(len(self.elements) - 1)

  def handle_startendtag(self, tag, attrs):
    self.elements.append([tag, dict(attrs), ""])

  def handle_endtag(self, tag):
    assert self.elements[self.stack.pop()][0] == tag

  def handle_data(self, data):
    if self.stack:
      self.elements[self.stack[-1]][2] += data

  def find(self, tag, word=None):
    return [
      (attrs, text)
      for name, attrs, text in self.elements
      if name == tag and (word is None or word in attrs.get("class", "").split())
    ]


@pytest.fixture
def page(tmp_path):
  def write(**changes):
    values = {
      "title": "A title",
      "summary": "A summary.",
      "results": RESULTS,
      "curves": CURVES,
      "config": {"beta": 0.1},
      "command": "python -m alignx_jax.study",
      "versions": {"jax": "1"},
    }
    report.write_report(tmp_path / "report.html", **values | changes)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    return text, Page(text)

  return write


def test_table_holds_the_inputs_in_order():
  head, rule, *rows = results.format_table(RESULTS).splitlines()
  assert len({len(line) for line in (head, rule, *rows)}) == 1
  assert set(rule) <= set("|-: ")
  for row, expected in zip(rows, RESULTS, strict=True):
    policy, condition, protocol, accuracy, pairs = (c.strip() for c in row.strip("|").split("|"))
    assert (policy, condition, protocol) == tuple(expected[k] for k in results.COLUMNS[:3])
    numbers = [float(n) for n in re.findall(r"[\d.]+", accuracy)]
    assert numbers == [round(100 * expected[key], 1) for key in ("accuracy", "low", "high")]
    assert int(pairs) == expected["examples"]


def test_page_is_balanced_and_fetches_nothing(page):
  text, parsed = page(sections=[("A user", ["One.", "Two."])])
  assert len(parsed.find("tr")) == 1 + len(RESULTS)
  assert not parsed.find("script") and not parsed.find("link") and "http:" not in text
  assert ("viewport" in text) and ("prefers-color-scheme: dark" in text)
  words = [text for _, text in parsed.find("dt")]
  assert {w for kind in results.LEGEND.values() for w in kind} | {"jax"} == set(words)


def test_all_text_is_escaped(page):
  evil = "<script>alert('1')</script>\"&\udc00"
  plain, _ = page()
  text, parsed = page(
    title=evil,
    summary=evil,
    results=[result(evil, evil, evil)],
    curves={evil: CURVES["ica"]},
    config={evil: evil},
    command=evil,
    versions={evil: evil},
    sections=[(evil, [evil])],
  )
  assert "<script" not in text
  assert not parsed.find("script")
  assert text.count("&lt;script&gt;") >= 15
  assert "<script" not in page(config=evil)[0]
  attributes = {key for _, attrs, _ in parsed.elements for key in attrs}
  assert attributes <= {key for _, attrs, _ in Page(plain).elements for key in attrs}


def test_bars_are_proportional_to_accuracy(page):
  _, parsed = page()
  bars = [attrs for attrs, _ in parsed.find("rect", "bar")]
  assert [float(bar["width"].rstrip("%")) for bar in bars] == pytest.approx(
    [100 * r["accuracy"] for r in RESULTS], abs=0.005
  )
  assert [bar["class"].split()[1] for bar in bars] == [r["policy"] for r in RESULTS]
  spans = [
    (float(a["x1"].rstrip("%")), float(a["x2"].rstrip("%")))
    for a, _ in parsed.find("line", "whisker")
    if a["x1"] != a["x2"]
  ]
  expected = [(100 * r["low"], 100 * r["high"]) for r in RESULTS]
  assert [x for span in spans for x in span] == pytest.approx(
    [x for span in expected for x in span], abs=0.005
  )
  assert any(a["x1"] == a["x2"] == "50%" for a, _ in parsed.find("line", "mark"))


def test_bars_of_a_policy_stand_together(page):
  _, parsed = page(results=[result("ica"), result("pba"), result("ica", "none")])
  bars = [attrs for attrs, _ in parsed.find("rect", "bar")]
  assert [bar["class"].split()[1] for bar in bars] == ["ica", "ica", "pba"]
  assert sorted(bars, key=lambda bar: float(bar["y"])) == bars


def test_curves_draw_every_run_raw_and_smooth(page):
  text, parsed = page()
  # A key for each run; in each of three panels a line a run, and a faint raw one if smoothed.
  assert len(parsed.find("path", "curve")) == 3 + 3 * (3 + 2)
  assert len(parsed.find("path", "faint")) == 3 * 2
  assert len(parsed.find("path", "dot")) == 3  # The run of one point.
  assert "log 2 = 0.693" in text
  for attrs, _ in parsed.find("path", "curve"):
    for x, y in re.findall(r"([-\d.]+),([-\d.]+)", attrs["d"]):
      assert 0 <= float(x) <= 360 and 0 <= float(y) <= 220
  assert len(text) < 200_000


def test_a_spike_survives_thinning():
  points = [(i, 1000.0 if i == 4321 else 0.0) for i in range(10_000)]
  kept = pictures._thin(points)
  assert (4321, 1000.0) in kept and len(kept) <= 800 and kept == sorted(kept)


def test_points_that_cannot_be_drawn_are_counted(page):
  curves = {"ica": [{"step": 0, "loss": 0.7}, {"step": 1, "loss": math.nan}]}
  text, _ = page(curves=curves)
  assert "1 points were NaN or infinite" in text
  assert text.count(results.EMPTY) == 2  # The two other metrics.


def test_empty_inputs(page, tmp_path):
  text, _ = page(results=[], curves={}, config={}, versions={}, command="")
  assert text.count(results.EMPTY) == 3
  assert results.EMPTY in page(curves={"ica": []})[0]
  assert results.format_table([]) == results.EMPTY
  results.write_results(tmp_path / "r.json", [])
  assert json.loads((tmp_path / "r.json").read_text()) == []


@pytest.mark.parametrize("change", [{"accuracy": 86.2}, {"low": math.nan}])
def test_a_share_out_of_range_is_refused(change):
  with pytest.raises(ValueError, match=r"results\[1\].*give a share"):
    results.format_table([result(), result() | change])


def test_a_missing_key_is_named():
  with pytest.raises(ValueError, match=r"results\[0\] has no 'low'"):
    results.format_table([{k: v for k, v in result().items() if k != "low"}])


def test_results_round_trip(tmp_path):
  path = tmp_path / "new" / "results.json"
  results.write_results(path, RESULTS)
  assert json.loads(path.read_text()) == RESULTS
  assert path.read_text().startswith('[\n {\n  "policy"')


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
  path = tmp_path / "results.json"
  results.write_results(path, RESULTS)
  assert list(tmp_path.iterdir()) == [path]

  def fail(*args):
    raise OSError("disk full")

  monkeypatch.setattr("os.replace", fail)
  with pytest.raises(OSError, match="disk full"):
    results.write_results(path, [])
  assert list(tmp_path.iterdir()) == [path]
  assert json.loads(path.read_text()) == RESULTS


def test_the_picture_stands_alone(tmp_path):
  pictures.write_picture(tmp_path / "accuracy.svg", RESULTS)
  root = ElementTree.parse(tmp_path / "accuracy.svg").getroot()
  assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("width") == "720"
  bars = root.findall("{http://www.w3.org/2000/svg}rect")
  assert [bar.get("width") for bar in bars] == [f"{100 * r['accuracy']:.2f}%" for r in RESULTS]
  with pytest.raises(ValueError, match="no results"):
    pictures.write_picture(tmp_path / "accuracy.svg", [])


def test_curves_of_shares_stand_where_their_numbers_are():
  row = lambda share: {"accuracy": share, "low": share - 0.25, "high": share + 0.25}
  drawn = pictures.share_curves(
    {"a <b>": {1: row(0.5), 16: row(0.75)}, "c": {4: row(0.25)}}, across="n"
  )
  ElementTree.fromstring(drawn.split("</svg>")[0] + "</svg>")
  assert "a &lt;b&gt;: 75.0 % [50.0, 100.0]" in drawn and "<b>" not in drawn
  points = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawn)]
  (middle,) = re.findall(r'class="mark" x1="\d+" x2="\d+" y1="([\d.]+)"', drawn)
  assert points[0] == float(middle)
  assert points[0] - points[1] == pytest.approx(points[2] - points[0], abs=0.1)
  # Values stand side by side in order, whoever has them.
  assert re.findall(r'<text class="soft middle" x="[\d.]+" y="268">([^<]*)<', drawn) == [
    "1",
    "4",
    "16",
  ]
  assert pictures.share_curves({}, across="n") == f"<p>{results.EMPTY}</p>"


def test_a_markdown_table_in_html_is_escaped():
  html = pictures.html_table(results.markdown(("a", "n"), [("<b>", 1), ("c|d", 2)], left=1))
  assert "<td>&lt;b&gt;</td><td class=number>1</td>" in html
