"""What the notebooks in notebooks/ share; and the command that runs them.

  python -m alignx_jax.notebook
  python -m alignx_jax.notebook notebooks/03_steer_a_user.ipynb

runs all of them, or those named, from top to bottom in a kernel of this Python, and saves what they
print and draw in them. The first that fails ends it and is left as it was.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------ in a notebook


def start() -> None:
  """Goes to the top of the checkout, from where configs/ and launch/ are found; quiets the log.

  JAX then takes the CPU, which is enough for the notebooks, unless JAX_PLATFORMS says otherwise.

  Raises:
    FileNotFoundError: the package is not in a checkout.
  """
  from absl import logging

  if not (ROOT / "configs" / "base.py").exists():
    raise FileNotFoundError(
      f"There is no {ROOT / 'configs'}: the notebooks need the whole repository; clone it, and "
      "pip install -e '.[notebooks]' there."
    )
  os.chdir(ROOT)
  if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
  if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    # What the compiler for TPUs asks a machine, and complains of where it is none.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  logging.set_verbosity(logging.WARNING)


def fresh(name: str) -> Path:
  """An empty workdir, runs/notebooks/NAME; what an earlier session left there is deleted."""
  workdir = Path("runs/notebooks") / name
  shutil.rmtree(workdir, ignore_errors=True)
  workdir.mkdir(parents=True)
  return workdir


def shell(command: str) -> str:
  """What a command prints, with the checkout as ".", the home as "~", temporary files as "$TMPDIR".

  Raises:
    RuntimeError: it fails; has its last words.
  """
  done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f"{command.split()[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
  text = (done.stdout + done.stderr).replace(str(ROOT), ".")
  text = re.sub(rf"{re.escape(tempfile.gettempdir())}/tmp\.\w+", "$TMPDIR", text)
  return text.replace(str(Path.home()), "~")


def picture(html: str):
  """One of the reports' pictures (evaluation/pictures.py and others), to be shown: its SVG."""
  from IPython.display import SVG

  from alignx_jax.evaluation.pictures import write_svg

  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "picture.svg"
    write_svg(path, html)
    return SVG(path.read_text(encoding="utf-8"))


def sliders(names: Sequence[str], draw: Callable[[dict[str, float]], None]):
  """A slider from −1 to 1 for each name, above what `draw` shows of all their values.

  Returns:
    An ipywidgets.VBox, the sliders first; to be shown.
  """
  import ipywidgets as widgets

  looks = {"style": {"description_width": "12em"}, "layout": {"width": "32em"}}
  handles = {
    name: widgets.FloatSlider(0.0, min=-1, max=1, step=0.1, description=name, **looks)
    for name in names
  }
  for handle in handles.values():
    handle.continuous_update = False
  shown = widgets.interactive_output(lambda **values: draw(values), handles)
  return widgets.VBox([*handles.values(), shown])


# ------------------------------------------------------------------ the command


def execute(path: Path, *, seconds: int = 600):
  """A notebook as it is after a run from top to bottom, without progress bars and widgets.

  A widget is nothing without its kernel, so what it shows at first is for a cell to draw.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell failed; shows it.
    nbclient.exceptions.CellTimeoutError: a cell took longer than that.
  """
  import nbformat
  from nbclient import NotebookClient

  notebook = nbformat.read(path, as_version=4)
  folder = {"metadata": {"path": str(path.parent)}}
  client = NotebookClient(
    notebook,
    timeout=seconds,
    kernel_name="python3",
    resources=folder,
    record_timing=False,
    extra_arguments=["--log-level=40"],  # errors: not how the kernel talks
  )
  client.execute()
  for cell in notebook.cells:
    if cell.cell_type == "code":
      cell.outputs = [output for output in cell.outputs if not _passes(output)]
  # Neither depends on what a notebook says, and both on where it was run.
  notebook.metadata = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
  }
  return notebook


def _passes(output) -> bool:
  """Whether an output is a widget, or nothing but tqdm's bars."""
  if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
    return True
  if output.output_type != "stream" or output.name != "stderr":
    return False
  lines = re.split(r"[\r\n]+", output.text)
  return all(not line.strip(" \x1b[A") or re.search(r"\d+%\||\d+(it|ex)", line) for line in lines)


def main(arguments: list[str]) -> None:
  parser = argparse.ArgumentParser(prog="alignx_jax.notebook", description=__doc__.split("\n")[0])
  parser.add_argument("paths", nargs="*", type=Path, help="by default all in notebooks/")
  parser.add_argument("--seconds", type=int, default=600, help="that a cell may take")
  options = parser.parse_args(arguments)
  import nbformat
  from absl import logging
  from tqdm import tqdm

  logging.set_verbosity(logging.WARNING)
  for path in tqdm(options.paths or sorted((ROOT / "notebooks").glob("*.ipynb")), unit="notebook"):
    started = time.perf_counter()
    notebook = execute(path, seconds=options.seconds)
    nbformat.write(notebook, path)
    tqdm.write(f"{path.name}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
  main(sys.argv[1:])
