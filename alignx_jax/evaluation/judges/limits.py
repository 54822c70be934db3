"""How fast an endpoint may be asked and what it may cost, by however many threads."""

import threading
import time


class Pace:
  """Lets so many requests through a minute, evenly.

  Args:
    per_minute: 0 for any number.
  """

  def __init__(self, per_minute: float):
    self._gap = 60 / per_minute if per_minute else 0.0
    self._lock = threading.Lock()
    self._next = 0.0

  def wait(self) -> None:
    """Returns when the next request may be sent."""
    with self._lock:
      now = time.monotonic()
      at = max(now, self._next)
      self._next = at + self._gap
    time.sleep(at - now)

  def hold(self, seconds: float) -> None:
    """Lets none through for so long."""
    with self._lock:
      self._next = max(self._next, time.monotonic() + seconds)


class Budget:
  """Money that is set aside before it is spent, so that the sum never passes the limit.

  Args:
    limit, spent: in dollars, or in what the prices are in.
  """

  def __init__(self, limit: float, spent: float = 0.0):
    self.limit, self.spent = limit, spent
    self._reserved = 0.0
    self._changed = threading.Condition()

  def reserve(self, most: float) -> bool:
    """Sets money aside; False where there is not as much, whatever those under way will leave."""
    with self._changed:
      while self.spent + self._reserved + most > self.limit:
        if not self._reserved:
          return False
        self._changed.wait()
      self._reserved += most
      return True

  def settle(self, most: float, cost: float) -> None:
    """What was set aside has become so much."""
    with self._changed:
      self._reserved -= most
      if self._reserved < 1e-12:  # sums of floats
        self._reserved = 0.0
      self.spent += cost
      self._changed.notify_all()
