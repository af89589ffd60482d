"""A web server on this machine that can be told to misbehave like the ones out there."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread


class Server(ThreadingHTTPServer):
    """Serves `files` by path. What it was asked for is in `requests`, as (path, Range header)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.knows_ranges = True
        self.tells_length = True
        self.cuts: list[int] = []
        """For each coming request, after how many bytes of its body the connection is closed."""
        self.stalls = False
        """Whether it falls silent at such a cut instead of closing the connection."""
        self.released = Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append((self.path[1:], asked))
        data = self.server.files.get(self.path[1:])
        if data is None:
            self.send_error(404)
            return
        told = re.fullmatch(r"bytes=(\d+)-", asked or "") if self.server.knows_ranges else None
        first = int(told[1]) if told else 0
        if told and first >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if told else 200)
        if told:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        if self.server.tells_length:
            self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        self._send(data[first:])

    def _send(self, body: bytes) -> None:
        if not self.server.cuts:
            self.wfile.write(body)
            return
        self.wfile.write(body[: self.server.cuts.pop(0)])
        self.wfile.flush()
        if self.server.stalls:
            self.server.released.wait(30)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
