"""The notebooks: as they are kept, and as they run."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from alignx_jax import notebook

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGE = (ROOT / "docs" / "explore.md").read_text(encoding="utf-8")
(URL,) = re.findall(r'url="(https://github\.com/\S+)"', (ROOT / "setup.py").read_text())
of_each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def _read(path):
  return nbformat.read(path, as_version=4)


def _code(path):
  return [cell for cell in _read(path).cells if cell.cell_type == "code"]


@of_each
def test_a_notebook_is_valid_and_small(path):
  nbformat.validate(_read(path))
  assert path.stat().st_size < 300_000


@of_each
def test_a_badge_opens_it_in_colab_here_and_on_the_page(path):
  repository = URL.removeprefix("https://github.com/")
  link = f"(https://colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name})"
  assert link in _read(path).cells[0].source
  assert link in PAGE


@of_each
def test_the_first_cell_installs_the_package_where_it_is_not(path, monkeypatch):
  first = _code(path)[0].source
  # IPython's own commands are told instead of run.
  code = re.sub(r"^( *)[!%](.*)$", r"\1said.append(r'''\2''')", first, flags=re.MULTILINE)
  said = []
  monkeypatch.chdir(ROOT)
  exec(code, {"said": said})
  assert said == []
  missing = code.replace('find_spec("alignx_jax")', 'find_spec("no_such_package")')
  missing = missing.replace("sys.path.append", "said.append")
  exec(missing, {"said": said})
  clone, install, folder = said
  assert clone == f"git clone --quiet --depth=1 {URL} project"
  assert install.startswith("pip install") and '"./project[notebooks]"' in install
  assert folder == str(ROOT / "project")


@of_each
def test_outputs_are_of_one_run_from_top_to_bottom_and_without_errors(path):
  cells = _code(path)
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  outputs = [output for cell in cells for output in cell.outputs]
  kinds = {output.output_type for output in outputs}
  assert "error" not in kinds and {"display_data", "stream"} <= kinds
  assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}


@of_each
def test_nothing_says_on_which_machine_it_was_run(path):
  text = path.read_text(encoding="utf-8")
  for word in ("/tmp", "/home/", "/root", "/Users/", "site-packages", str(ROOT)):
    assert word not in text, word
  assert set(_read(path).metadata) == {"kernelspec", "language_info"}


@of_each
def test_what_a_notebook_points_to_is_there(path):
  for cell in _read(path).cells:
    if cell.cell_type == "markdown":
      for link in re.findall(r"\]\((\w[^):]*)\)", cell.source):
        assert (path.parent / link).exists(), link
    for file in re.findall(
      r"\b(?:configs|alignx_jax|launch|docs)/[\w/]+\.(?:py|sh|md)\b", cell.source
    ):
      assert (ROOT / file).exists(), file


@pytest.mark.long
@of_each
def test_a_notebook_runs(path, monkeypatch):
  monkeypatch.delenv("XLA_FLAGS", raising=False)  # these tests' two devices
  ran = notebook.execute(path, seconds=600)
  counts = [cell.execution_count for cell in ran.cells if cell.cell_type == "code"]
  assert counts == list(range(1, len(counts) + 1))


# ------------------------------------------------------------------ what runs them


def _written(path, *sources):
  cells = [nbformat.v4.new_code_cell(source) for source in sources]
  nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
  return path


def test_of_what_is_printed_progress_bars_alone_are_left_out(tmp_path):
  bar = "from tqdm import tqdm\nfor _ in tqdm(range(3), desc='scoring', unit='ex'):\n  pass"
  warning = "import sys\nprint('a warning', file=sys.stderr)"
  path = _written(tmp_path / "kept.ipynb", bar, "print('100 %')", warning)
  ran = notebook.execute(path)
  said = [[(output.name, output.text) for output in cell.outputs] for cell in ran.cells]
  assert said == [[], [("stdout", "100 %\n")], [("stderr", "a warning\n")]]


def test_a_cell_that_fails_ends_the_run(tmp_path):
  path = _written(tmp_path / "failing.ipynb", "1 / 0", "print('never')")
  before = path.read_bytes()
  with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
    notebook.main([str(path)])
  assert path.read_bytes() == before


def test_a_commands_output_is_told_without_this_machines_places():
  said = notebook.shell(f"echo {ROOT}/launch {Path.home()}/x $(mktemp -u); echo oops >&2")
  assert said == "./launch ~/x $TMPDIR\noops\n"
  with pytest.raises(RuntimeError, match="false ended with 1"):
    notebook.shell("false")


def test_a_fresh_workdir_is_empty(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (notebook.fresh("one") / "old").touch()
  assert list(notebook.fresh("one").iterdir()) == []


def test_a_moved_slider_draws_anew():
  drawn = []
  box = notebook.sliders(["Likes humor", "Likes music"], drawn.append)
  assert drawn == [{"Likes humor": 0.0, "Likes music": 0.0}]
  box.children[1].value = -0.4
  assert drawn[1:] == [{"Likes humor": 0.0, "Likes music": -0.4}]
