"""What the pages show: README.md and those of docs/."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Shown(NamedTuple):
  """A command, or a block of Python, as it stands on a page."""

  page: Path
  text: str


def everything_shown() -> list[Shown]:
  """Every line of the bash blocks and every Python block, in the order of pages and lines."""
  found = []
  for page in PAGES:
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
      if language == "bash":
        found += [Shown(page, line) for line in text.splitlines()]
      if language == "python":
        found.append(Shown(page, text))
  return found


def shown_on_pages(pattern: str) -> list[str]:
  """The commands and Python blocks in which the pattern is found.

  A test that calls this runs them; tests/test_pages.py sees to it that none is left over.
  """
  return [text for _, text in everything_shown() if re.search(pattern, text)]
