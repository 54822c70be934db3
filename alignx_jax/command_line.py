"""What all entry points share: --config and --workdir, how a process starts, mistakes told."""

import hashlib
import os
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from alignx_jax.files import as_path

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything a run makes is written.")


def run(
  main: Callable[[ConfigDict, Path | None], None] | Callable[[], None],
  *,
  requires: Sequence[str] = ("config", "workdir"),
  keep_programs: bool = True,
) -> None:
  """Parses the command line and calls main(config, workdir).

  Args:
    requires: which of the two there are to be; with neither, main() is called.
    keep_programs: the next start need not compile again what this one did.

  What this package raises on purpose (a bad record, a file that is not there, a loss that
  is not finite) ends the program with its message; --verbosity=1 shows where it came
  from. Anything else is a bug and keeps its traceback.
  """
  _use_huge_pages()
  if keep_programs:
    _keep_programs()
  flags.mark_flags_as_required(requires)

  def call(argv):
    if len(argv) > 1:
      raise app.UsageError(f"What is {argv[1]!r}? Options start with --.")
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # the libraries' notes would bury progress bars
    if "config" in requires:
      _check_loaded()
    try:
      workdir = None if _WORKDIR.value is None else as_path(_WORKDIR.value)
      main(*((_CONFIG.value, workdir) if requires else ()))
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
      if not _raised_here(error):
        raise
      logging.debug("Raised here:", exc_info=True)
      sys.exit(f"Error: {error}")

  app.run(call, flags_parser=_parse)


def _check_loaded() -> None:
  """Ends the program with a sentence if there is no such config file."""
  try:
    _ = _CONFIG.value.is_locked
  except OSError as error:
    sys.exit(f"Error: --config: {str(error).splitlines()[-1].strip()}")


def _use_huge_pages() -> None:
  """Starts the program anew where its arrays would lie in small pages.

  XLA's CPU backend allocates and frees them in each step, and clearing pages of 4 kB is then a
  quarter of its time. glibc's malloc asks for huge ones if told so before a program starts.
  """
  pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
  asked = os.environ.get("GLIBC_TUNABLES", "")
  if "malloc.hugetlb" in asked or not pages.exists() or "[madvise]" not in pages.read_text():
    return
  os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [asked, "glibc.malloc.hugetlb=1"]))
  sys.stdout.flush()
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _keep_programs() -> None:
  """Has JAX keep compiled programs in the user's cache directory, at most 2 GiB of them.

  JAX's own variables go before: JAX_COMPILATION_CACHE_DIR for another directory, and
  JAX_ENABLE_COMPILATION_CACHE=false for none. A program for a CPU is code for that CPU's
  features: computers that differ in these and share a home have directories of their own.
  """
  if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return
  features = platform.machine()
  if (info := Path("/proc/cpuinfo")).exists():
    lines = info.read_text().splitlines()
    features += next((line for line in lines if line.startswith(("flags", "Features"))), "")
  cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  digest = hashlib.sha256(features.encode()).hexdigest()[:12]
  directory = cache / "alignx_jax" / f"programs-{digest}"
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError:  # no home to write to: compile anew
    return
  for program in directory.glob("*-cache"):
    # The time of its last use is written after it: a killed process left half a program, over
    # which JAX would stumble at every start.
    if not program.with_name(program.name.removesuffix("cache") + "atime").exists():
      program.unlink(missing_ok=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
  os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2 * 2**30)
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def _parse(argv):
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError) as error:  # a locked config has no such field or section
    if "get_config" in str(error):
      sys.exit("Error: the file has no get_config(); write one, as those in configs/ do.")
    reason = error.args[0]
    reason = str(reason.args[0] if isinstance(reason, KeyError) else reason)
    reason = " ".join(reason.split())
    sys.exit(f"Error: no such config field: {reason} (All fields are in configs/base.py.)")


def _raised_here(error: BaseException) -> bool:
  last = traceback.extract_tb(error.__traceback__)[-1].filename
  return Path(last).is_relative_to(Path(__file__).parent)
