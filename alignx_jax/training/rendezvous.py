"""Where the processes of a run meet before JAX joins them.

JAX waits for them too, but ends the program when one does not come, without a word of which.
"""

import contextlib
import os
import socket
import time


def meet(address: str, count: int, index: int, seconds: float) -> None:
  """Waits for all processes, at the address at which JAX joins them afterwards.

  Args:
    address: host:port of process 0.
    index: of this process, of `count`.
  Raises:
    RuntimeError: some did not come in time; names them, in every process that did.
  """
  host, port = address.rsplit(":", 1)
  if index == 0:
    port = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", address).rsplit(":", 1)[1]
    missing = _receive(int(port), count, seconds)
  else:
    missing = _announce(host, int(port), index, seconds)
  if missing:
    raise RuntimeError(
      f"Waited {seconds:.0f} s at {address} for process {', '.join(map(str, missing))} of {count}: "
      "see its log; start all processes again."
    )


def _receive(port: int, count: int, seconds: float) -> list[int]:
  """Who did not come; tells it to those that did."""
  deadline, here = time.monotonic() + seconds, {}
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  with (
    contextlib.ExitStack() as stack,
    socket.create_server(("", port), family=family, dualstack_ipv6=both) as server,
  ):
    while len(here) < count - 1 and (left := deadline - time.monotonic()) > 0:
      server.settimeout(left)
      with contextlib.suppress(OSError, ValueError):  # in vain, or someone else
        connection = stack.enter_context(server.accept()[0])
        connection.settimeout(5)
        here[int(_line(connection))] = connection
    missing = [index for index in range(1, count) if index not in here]
    for connection in here.values():
      with contextlib.suppress(OSError):
        connection.sendall(" ".join(map(str, missing)).encode() + b"\n")
  return missing


def _announce(host: str, port: int, index: int, seconds: float) -> list[int]:
  """Who did not come, as process 0 says; itself if it cannot be reached."""
  deadline = time.monotonic() + seconds
  while (left := deadline - time.monotonic()) > 0:
    with (
      contextlib.suppress(OSError, ValueError),
      socket.create_connection((host, port), timeout=left) as connection,
    ):
      connection.settimeout(seconds + 5)  # it may have begun to wait just now
      connection.sendall(f"{index}\n".encode())
      return [int(missing) for missing in _line(connection).split()]
    time.sleep(0.1)
  return [0]


def _line(connection: socket.socket) -> str:
  """The next line.

  Raises:
    ValueError: there is none.
  """
  line = connection.makefile("rb").readline(1000)
  if not line.endswith(b"\n"):
    raise ValueError("not a line")
  return line.decode("ascii")
