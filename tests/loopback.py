"""A file server on loopback that does what a test's script says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CONTENT = bytes(range(256)) * 4000  # 1,024,000 bytes
Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    loopback: Loopback

    def do_GET(self) -> None:
        self.close_connection = True
        with self.loopback.lock:
            self.loopback.requests.append(
                {name.lower(): value for name, value in self.headers.items()} | {"path": self.path}
            )
            answers = self.loopback.script.get(self.path, [status(404)])
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
        with suppress(OSError):  # the client has gone
            answer(self)

    do_CONNECT = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class Loopback:
    """`script` holds for each path the answers to one request after another; the last one stays.

    `gate` is what answers with `hold` wait for.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.script: dict[str, list[Answer]] = {}
        self.requests: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.gate = threading.Event()
        self.waiting = threading.Event()

    def serve(self, path: str, *answers: Answer) -> str:
        """The address under which the answers are given."""
        self.script[path] = list(answers)
        return self.url + path

    def ranges(self) -> list[str | None]:
        """The Range header of each request so far."""
        return [request.get("range") for request in self.requests]


@contextmanager
def serving() -> Iterator[Loopback]:
    class Scripted(Handler):
        pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as httpd:
        httpd.daemon_threads = True
        httpd.block_on_close = False
        Scripted.loopback = Loopback(f"http://127.0.0.1:{httpd.server_port}")
        threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield Scripted.loopback
        Scripted.loopback.gate.set()
        httpd.shutdown()


def send(
    code: int,
    body: bytes = b"",
    *,
    length: int | None = None,
    cut: int | None = None,
    hold: int | None = None,
    **headers: str,
) -> Answer:
    """An answer word for word.

    Args:
        length: Content-Length; by default that of the body, -1: none.
        cut: the connection ends after so many bytes of the body.
        hold: after so many bytes the server says nothing until its gate opens.
        headers: with _ for -.
    """

    def answer(handler: Handler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if length != -1:
            handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body[: len(body) if cut is None else cut][:hold])
        if hold is not None:
            handler.wfile.flush()
            handler.loopback.waiting.set()
            handler.loopback.gate.wait(600)
            handler.wfile.write(body[hold:])

    return answer


def status(code: int, **headers: str) -> Answer:
    return send(code, **headers)


def honest(
    body: bytes = CONTENT,
    *,
    cut: int | None = None,
    hold: int | None = None,
    length: int | None = None,
    most: int | None = None,
) -> Answer:
    """A server that supports ranges; `most`: it gives at most so many bytes of a range."""

    def answer(handler: Handler) -> None:
        wanted = handler.headers.get("Range")
        if wanted is None:
            send(200, body, cut=cut, hold=hold, length=length)(handler)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        part = body[start:][:most]
        if not part:
            send(416, Content_Range=f"bytes */{len(body)}")(handler)
            return
        content_range = f"bytes {start}-{start + len(part) - 1}/{len(body)}"
        send(206, part, cut=cut, hold=hold, Content_Range=content_range)(handler)

    return answer
