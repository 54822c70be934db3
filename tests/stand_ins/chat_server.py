"""A stand-in for an OpenAI-compatible chat endpoint, on a port of its own in this process."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer(ThreadingHTTPServer):
  """Answers by `script`, a function of the number of the request, from 0, and its body.

  The script gives a reply's text; or a dict: "status", "headers", "body" as bytes, "seconds" to
  wait before it, "usage" or "finish_reason" of the completion.
  """

  daemon_threads = True
  block_on_close = False

  def __init__(self, script):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.script, self.requests, self.lock = script, [], threading.Lock()
    self.is_over = threading.Event()

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
  timeout = 5

  def do_POST(self):
    size = int(self.headers["Content-Length"])
    body = json.loads(self.rfile.read(size))
    server = self.server
    with server.lock:
      number = len(server.requests)
      server.requests.append((self.path, dict(self.headers), body))
    said = server.script(number, body)
    said = said if isinstance(said, dict) else {"text": said}
    server.is_over.wait(said.get("seconds", 0))
    choice = {"message": {"content": said.get("text", "A")}, "finish_reason": "stop"}
    choice |= {"finish_reason": said["finish_reason"]} if "finish_reason" in said else {}
    usage = said.get("usage", {"prompt_tokens": 100, "completion_tokens": 1})
    completion = json.dumps({"choices": [choice], "usage": usage}).encode()
    content = said.get("body", completion)
    with contextlib.suppress(OSError):  # nobody waits any more
      self.send_response(said.get("status", 200))
      for name, value in said.get("headers", {}).items():
        self.send_header(name, value)
      self.send_header("Content-Length", str(len(content)))
      self.end_headers()
      self.wfile.write(content)

  def log_message(self, *_):
    pass


@contextlib.contextmanager
def chat_server(script):
  """A server that answers by a script while the block runs."""
  server = ChatServer(script)
  thread = threading.Thread(
    target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
  )
  thread.start()
  try:
    yield server
  finally:
    server.is_over.set()
    server.shutdown()
    server.server_close()
