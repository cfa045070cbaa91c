"""Downloads from a server on loopback: hashes, sizes, redirects, mirrors, and nothing left behind."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from kdcli import fetch
from kdcli.catalog import RemoteFile
from kdcli.errors import KdError
from kdcli.events import Event, Note, Progress

CONTENT = bytes(range(256)) * 4000  # 1,024,000 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()
BLOB = hashlib.sha1(b"blob 1024000\0" + CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        kind = self.path.strip("/").split("/")[0]
        if kind == "missing":
            self.send_error(404)
        elif kind in ("away", "loop", "file"):
            self.send_response(302)
            where = {"away": "http://example.org/x", "loop": "/loop", "file": "file:///etc/passwd"}[kind]
            self.send_header("Location", where)
            self.end_headers()
        elif kind == "moved":
            self.send_response(301)
            self.send_header("Location", "/good")
            self.end_headers()
        elif kind == "endless":  # no length, more than there may be
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(400):
                    self.wfile.write(bytes(1 << 16))
            except OSError:
                pass
        else:
            body = b"swapped" * 146_286 if kind == "bad" else CONTENT
            self.send_response(200)
            self.send_header("Content-Length", str(len(body[:1_024_000])))
            self.end_headers()
            self.wfile.write(body[: 500_000 if kind == "cut" else 1_024_000])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def remote(*urls: str, size: int | None = 1_024_000, blob: bool = False) -> RemoteFile:
    if blob:
        return RemoteFile("x.bin", "data", urls, git_blob_sha1=BLOB, size_bytes=size)
    return RemoteFile("x.bin", "data", urls, sha256=SHA256, size_bytes=size)


@pytest.mark.parametrize("blob", [False, True])
@pytest.mark.parametrize("path", ["good", "moved"])
def test_a_right_file_arrives_once(server: str, tmp_path: Path, path: str, blob: bool) -> None:
    seen: list[Event] = []
    target = tmp_path / "new" / "x.bin"
    found = fetch.fetch(remote(server + path, blob=blob), target, on_event=seen.append)
    assert (found.path, found.status, found.size_bytes) == (target, "downloaded", 1_024_000)
    assert target.read_bytes() == CONTENT
    assert seen[-1] == Progress("x.bin", 1_024_000, 1_024_000, "bytes")
    again = fetch.fetch(remote("https://nowhere.invalid/x", blob=blob), target)
    assert again.status == "present"


@pytest.mark.parametrize(
    ("path", "size", "message"),
    [
        ("bad", 1_024_000, "its hash is not SHA-256"),
        ("bad", None, "its hash is not SHA-256"),
        ("cut", 1_024_000, "cannot fetch"),
        ("missing", 1_024_000, "404"),
        ("endless", 1_024_000, "larger than the 1,024,000 bytes"),
        ("good", 1_023_999, "larger than"),
        ("good", 1_024_001, "1,024,000 bytes instead of 1,024,001"),
        ("away", 1_024_000, "refuses http://example.org/x: it is redirected to not an https"),
        ("file", 1_024_000, "refuses|cannot fetch"),
        ("loop", 1_024_000, "redirects more than 5 times"),
    ],
)
def test_what_goes_wrong_leaves_nothing(
    server: str, tmp_path: Path, path: str, size: int | None, message: str
) -> None:
    with pytest.raises(KdError, match=message) as caught:
        fetch.fetch(remote(server + path, size=size), tmp_path / "x.bin")
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/x",
        "ftp://127.0.0.1/x",
        "file:///etc/passwd",
        "http://127.0.0.1.example.org/",
        "https://",
    ],
)
def test_only_https_leaves_this_machine(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx.Client, "stream", lambda *_, **__: pytest.fail("contacted"))
    with pytest.raises(KdError, match="refuses"):
        fetch.fetch(remote(), tmp_path / "x", source=url)


def test_mirrors_in_order(server: str, tmp_path: Path) -> None:
    seen: list[Event] = []
    fetch.fetch(
        remote(server + "missing", server + "bad", server + "good"), tmp_path / "x", on_event=seen.append
    )
    notes = [event.text for event in seen if isinstance(event, Note)]
    assert len(notes) == 2 and "404" in notes[0] and "mirror 3 of 3" in notes[1]
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_a_wrong_file_is_replaced_only_by_a_right_one(server: str, tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    target.write_bytes(b"mine")
    with pytest.raises(KdError):
        fetch.fetch(remote(server + "bad"), target)
    assert target.read_bytes() == b"mine"
    seen: list[Event] = []
    assert fetch.fetch(remote(server + "good"), target, on_event=seen.append).status == "downloaded"
    assert isinstance(seen[0], Note) and "will be replaced" in seen[0].text


def test_from_a_file(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "out" / "x.bin"
    source.write_bytes(CONTENT)
    assert fetch.fetch(remote(), target, source=str(source)).status == "copied"
    assert target.read_bytes() == CONTENT
    source.write_bytes(CONTENT[:-1] + b"!")
    target.unlink()
    with pytest.raises(KdError, match="its hash is not"):
        fetch.fetch(remote(), target, source=str(source))
    with pytest.raises(KdError, match="no such file"):
        fetch.fetch(remote(), target, source=str(tmp_path / "absent"))
    assert list(target.parent.iterdir()) == []


def test_interrupt_leaves_nothing(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "EVENT_SECONDS", 0)

    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(remote(server + "good"), tmp_path / "x", on_event=stop)
    assert list(tmp_path.iterdir()) == []


def test_no_server_and_no_place(server: str, tmp_path: Path) -> None:
    with pytest.raises(KdError, match="cannot fetch"):
        fetch.fetch(remote("http://127.0.0.1:9/x"), tmp_path / "x")
    with pytest.raises(KdError, match="is a folder"):
        fetch.fetch(remote(server + "good"), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(KdError, match="cannot write"):
        fetch.fetch(remote(server + "good"), tmp_path / "file" / "x")
    with pytest.raises(KdError, match="no hash is known"):
        fetch.fetch(RemoteFile("x", "data", (server + "good",)), tmp_path / "y")
