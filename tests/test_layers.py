"""Folders import only from those above them in CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = re.findall(r"^\| (`alignx_jax/.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
LAYERS = [re.findall(r"`alignx_jax/(\w+|\*)(?:/|\.py)`", row) for row in ROWS]
PLACE = {name: i for i, names in enumerate(LAYERS) for name in names}


def _place(module: str) -> int:
  """Of a module, "alignx_jax.NAME…", in the list; commands and all that is not named come last."""
  name = module.split(".")[1]
  return PLACE.get(name, PLACE["*"])


def _imported(path: Path):
  """Modules of the package that a file imports, wherever in it."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      top = node.module == "alignx_jax"
      names = [f"alignx_jax.{alias.name}" for alias in node.names] if top else [node.module]
    else:
      continue
    yield from (name for name in names if name.startswith("alignx_jax."))


def test_every_folder_has_a_place():
  folders = {path.parent.name for path in ROOT.glob("alignx_jax/*/__init__.py")}
  assert folders < set(PLACE)


def test_no_import_goes_up():
  up = []
  for path in ROOT.glob("alignx_jax/**/*.py"):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    up += [(module, other) for other in _imported(path) if _place(other) > _place(module)]
  assert not up
