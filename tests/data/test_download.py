"""Downloads from a loopback server that cuts, lies, stalls and redirects; a wrong file never gets the name."""

from __future__ import annotations

import errno
import gzip
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from kdcli.base import files
from kdcli.base.errors import KdError
from kdcli.base.events import Event, Note, Progress
from kdcli.data import download
from kdcli.data.catalog import DOWNLOADS, RemoteFile
from tests.loopback import CONTENT, Answer, Loopback, honest, send, serving, status

SHA256 = hashlib.sha256(CONTENT).hexdigest()
BLOB = hashlib.sha1(b"blob 1024000\0" + CONTENT).hexdigest()
OTHER = CONTENT[::-1]
HALF = 500_000
REST = CONTENT[HALF:]


@pytest.fixture(scope="module")
def running() -> Iterator[Loopback]:
    with serving() as loopback:
        yield loopback


@pytest.fixture
def server(running: Loopback) -> Loopback:
    running.script.clear()
    running.requests.clear()
    running.gate.clear()
    running.waiting.clear()
    return running


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No proxies and no waiting; the seconds that would have been waited."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    seconds: list[float] = []
    monkeypatch.setattr(download.time, "sleep", seconds.append)
    return seconds


def remote(*urls: str, size: int | None = 1_024_000, blob: bool = False) -> RemoteFile:
    if blob:
        return RemoteFile("x.bin", "data", urls, git_blob_sha1=BLOB, size_bytes=size)
    return RemoteFile("x.bin", "data", urls, sha256=SHA256, size_bytes=size)


class Got(NamedTuple):
    status: str
    notes: list[str]


def get(file: RemoteFile, target: Path, **options: Any) -> Got:
    seen: list[Event] = []
    status = download.fetch(file, target, on_event=seen.append, **options)
    assert target.read_bytes() == CONTENT
    return Got(status, [event.text for event in seen if isinstance(event, Note)])


def listing(folder: Path) -> list[str]:
    """Names in a folder, except the lock, which stays."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def leave_partial(target: Path, content: bytes = CONTENT[:HALF]) -> None:
    target.with_name(f".{target.name}.partial").write_bytes(content)


# --- a whole file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blob", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_an_intact_file_is_fetched_once(server: Loopback, tmp_path: Path, moved: bool, blob: bool) -> None:
    url = server.serve("/good", honest())
    if moved:
        url = server.serve("/moved", status(301, Location="/good")).replace("127.0.0.1", "localhost")
    seen: list[Event] = []
    target = tmp_path / "new" / "x.bin"
    assert download.fetch(remote(url, blob=blob), target, on_event=seen.append) == "downloaded"
    assert target.read_bytes() == CONTENT and listing(target.parent) == ["x.bin"]
    assert seen[0] == Progress("x.bin", 0, 1_024_000, "bytes")
    assert seen[-1] == Progress("x.bin", 1_024_000, 1_024_000, "bytes")
    assert {request["accept-encoding"] for request in server.requests} == {"identity"}
    assert download.fetch(remote("https://nowhere.invalid/x", blob=blob), target) == "present"


@pytest.mark.parametrize(
    ("answer", "size", "message"),
    [
        (honest(OTHER), 1_024_000, "its hash is not SHA-256"),
        (honest(OTHER), None, "its hash is not SHA-256"),
        (status(404), 1_024_000, "404"),
        (send(206, CONTENT, Content_Range="bytes 0-1023999/1024000"), 1_024_000, "206"),
        (send(200, bytes(3 << 20), length=-1), 1_024_000, "bytes instead of 1,024,000"),
        (honest(), 1_023_999, "1,024,000 bytes instead of 1,023,999"),
        (honest(), 1_024_001, "1,024,000 bytes instead of 1,024,001"),
        (send(200, CONTENT, Content_Type="text/html; charset=utf-8"), 1_024_000, "answers with a web page"),
        (status(302, Location="http://example.org/x"), 1_024_000, "refuses http://example.org/x"),
        (status(302, Location="file:///etc/passwd"), 1_024_000, "refuses file:"),
        (status(302, Location="/x"), 1_024_000, "maximum allowed redirects"),
    ],
)
def test_a_wrong_answer_is_requested_once_and_leaves_nothing(
    server: Loopback, tmp_path: Path, waits: list[float], answer: Answer, size: int | None, message: str
) -> None:
    with pytest.raises(KdError, match=message) as caught:
        download.fetch(remote(server.serve("/x", answer), size=size), tmp_path / "x.bin")
    assert caught.value.hint
    assert waits == []
    assert listing(tmp_path) == []


def test_a_file_of_unknown_size_is_capped(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 1_000_000)
    for answer in (honest(), send(200, CONTENT, length=-1)):
        with pytest.raises(KdError, match="bytes instead of at most 1,000,000"):
            download.fetch(remote(server.serve("/x", answer), size=None), tmp_path / "x.bin")
        assert listing(tmp_path) == []


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/x",
        "ftp://127.0.0.1/x",
        "file:///etc/passwd",
        "http://127.0.0.1.example.org/",
        "http://127.0.0.1@example.org/",
        "http://10.0.0.1/x",
        "http://localhost.example.org/",
        "https://",
        "https://example.org:port/x",
    ],
)
def test_only_https_leaves_this_machine(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda *_: pytest.fail("contacted"))
    with pytest.raises(KdError, match=r"refuses|cannot use"):
        download.fetch(remote(), tmp_path / "x", source=url)


def mock_transport(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[httpx.Request], httpx.Response]
) -> None:
    """A function answers all addresses, https too."""
    real = httpx.Client

    def client(**options: Any) -> httpx.Client:
        return real(**{**options, "mounts": {}}, transport=httpx.MockTransport(answer))

    monkeypatch.setattr(httpx, "Client", client)


@pytest.mark.parametrize("where", ["http://mirror.example/x", "http://127.0.0.1:9/x", "//mirror.example/x"])
def test_https_never_redirects_to_http(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        if request.url.path == "/start":
            return httpx.Response(302, headers={"Location": where})
        return httpx.Response(200, content=iter([CONTENT]))

    mock_transport(monkeypatch, answer)
    file = remote("https://one.example/start")
    if where.startswith("http:"):
        with pytest.raises(KdError, match=f"refuses {where}: not an https address"):
            download.fetch(file, tmp_path / "x.bin")
        assert asked == ["https://one.example/start"]
    else:
        get(file, tmp_path / "x.bin")
        assert asked[1:] == ["https://mirror.example/x"]


def test_a_password_is_sent_and_not_shown(server: Loopback, tmp_path: Path) -> None:
    url = server.serve("/x", honest(cut=HALF), status(404)).replace("//", "//me:secret@")
    with pytest.raises(KdError, match="404") as caught:
        download.fetch(remote(url), tmp_path / "x.bin")
    assert "secret" not in caught.value.message + caught.value.hint
    assert server.requests[0]["authorization"] == "Basic bWU6c2VjcmV0"


def test_a_wrong_file_is_replaced_only_by_an_intact_one(server: Loopback, tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    target.write_bytes(b"mine")
    with pytest.raises(KdError):
        download.fetch(remote(server.serve("/bad", honest(OTHER))), target)
    assert target.read_bytes() == b"mine"
    assert download.inspect(remote(), target) == ("other", 0)
    got = get(remote(server.serve("/good", honest())), target)
    assert got.status == "downloaded" and "will be replaced" in got.notes[0]


def test_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "out" / "x.bin"
    source.write_bytes(CONTENT)
    assert get(remote(), target, source=str(source)).status == "copied"
    source.write_bytes(CONTENT[:-1] + b"!")
    target.unlink()
    for file in (remote(), remote(blob=True)):
        with pytest.raises(KdError, match="its hash is not"):
            download.fetch(file, target, source=str(source))
    with pytest.raises(KdError, match="no such file"):
        download.fetch(remote(), target, source=str(tmp_path / "absent"))
    source.write_bytes(CONTENT[:-1])
    with pytest.raises(KdError, match="1,023,999 bytes instead of"):
        download.fetch(remote(), target, source=str(source))
    assert listing(target.parent) == []

    def denied(source: Path, target: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(source))

    source.write_bytes(CONTENT)
    monkeypatch.setattr(download.shutil, "copyfile", denied)
    with pytest.raises(KdError, match=r"cannot read or write .*source: Permission denied"):
        download.fetch(remote(), target, source=str(source))


def test_a_target_below_a_file_is_an_error(server: Loopback, tmp_path: Path) -> None:
    url = server.serve("/x", honest())
    (tmp_path / "file").write_text("")
    with pytest.raises(KdError, match="cannot read or write"):
        download.fetch(remote(url), tmp_path / "file" / "x")


# --- a partial download ------------------------------------------------------------------------------------


def test_a_cut_download_resumes(server: Loopback, tmp_path: Path, waits: list[float]) -> None:
    url = server.serve("/x", honest(cut=HALF), honest(cut=200_000), honest())
    got = get(remote(url), tmp_path / "x.bin")
    assert server.ranges() == [None, "bytes=500000-", "bytes=700000-"]
    assert waits == [1.0, 1.0] and all("trying again" in note for note in got.notes)
    assert listing(tmp_path) == ["x.bin"]


def test_a_partial_file_outlives_its_process(server: Loopback, tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    file = remote(server.serve("/x", honest(cut=HALF), status(404)))
    assert download.inspect(file, target) == ("absent", 0)
    with pytest.raises(KdError, match="404") as caught:
        download.fetch(file, target)
    assert "0.5 MB are kept" in caught.value.hint
    assert listing(tmp_path) == [".x.bin.partial"]
    assert download.inspect(file, target) == ("partial", HALF)
    server.serve("/x", honest())
    get(file, target)
    assert server.ranges()[2:] == ["bytes=500000-"]
    assert download.inspect(file, target) == ("present", 0) and listing(tmp_path) == ["x.bin"]


def test_resumed_download_may_arrive_in_several_parts(server: Loopback, tmp_path: Path) -> None:
    leave_partial(tmp_path / "x.bin")
    get(remote(server.serve("/x", honest(most=300_000))), tmp_path / "x.bin")
    assert server.ranges() == ["bytes=500000-", "bytes=800000-"]


@pytest.mark.parametrize(
    "answer",
    [
        send(416, Content_Range="bytes */1024000"),
        send(206, REST[::-1], Content_Range="bytes 500000-1023999/1024000"),
        send(206, REST[::-1]),
    ],
)
def test_after_a_wrong_range_the_whole_is_requested(server: Loopback, tmp_path: Path, answer: Answer) -> None:
    leave_partial(tmp_path / "x.bin")
    got = get(remote(server.serve("/x", answer, honest())), tmp_path / "x.bin")
    assert server.ranges() == ["bytes=500000-", None]
    assert len(got.notes) == 1 and "starting over" in got.notes[0]


def test_200_instead_of_206_replaces_the_partial_file(server: Loopback, tmp_path: Path) -> None:
    leave_partial(tmp_path / "x.bin", OTHER[:HALF])
    got = get(remote(server.serve("/x", send(200, CONTENT))), tmp_path / "x.bin")
    assert server.ranges() == ["bytes=500000-"] and got.notes == []


def test_a_resumed_file_with_a_wrong_hash_is_fetched_anew(server: Loopback, tmp_path: Path) -> None:
    """The whole with a wrong hash is refused, even if that one was cut and resumed in between."""
    leave_partial(tmp_path / "x.bin", OTHER[:HALF])
    got = get(remote(server.serve("/x", honest())), tmp_path / "x.bin")
    assert server.ranges() == ["bytes=500000-", None]
    assert len(got.notes) == 1 and "wrong hash; starting over" in got.notes[0]
    (tmp_path / "x.bin").unlink()
    server.requests.clear()
    leave_partial(tmp_path / "x.bin")
    file = remote(server.serve("/x", honest(OTHER), honest(OTHER, cut=HALF), honest(OTHER)))
    with pytest.raises(KdError, match="its hash is not"):
        download.fetch(file, tmp_path / "x.bin")
    assert server.ranges() == ["bytes=500000-", None, "bytes=500000-", None] and listing(tmp_path) == []


@pytest.mark.parametrize("size", [None, 1_024_000])
def test_an_answer_without_length_that_is_cut_is_not_complete(
    server: Loopback, tmp_path: Path, size: int | None
) -> None:
    file = remote(server.serve("/x", honest(cut=HALF, length=-1), honest()), size=size)
    if size is None:  # the end of the connection is the end of the file: only the hash can tell
        with pytest.raises(KdError, match="its hash is not"):
            download.fetch(file, tmp_path / "x.bin")
        return
    got = get(file, tmp_path / "x.bin")
    assert server.ranges() == [None, "bytes=500000-"]
    assert "ended after 500,000 of 1,024,000 bytes" in got.notes[0]


def test_a_complete_partial_file_needs_no_server(server: Loopback, tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    file = remote(server.serve("/x", honest()))
    for content, asked in ((CONTENT, []), (OTHER, ["bytes=1024000-", None])):
        server.requests.clear()
        leave_partial(target, content)
        assert get(file, target).status == "downloaded"
        assert server.ranges() == asked
        target.unlink()


def test_a_gz_declared_as_content_encoding_stays_as_it_is(server: Loopback, tmp_path: Path) -> None:
    packed = gzip.compress(CONTENT)
    file = RemoteFile(
        "x.gz", "data", (server.serve("/x", send(200, packed, Content_Encoding="gzip")),),
        hashlib.sha256(packed).hexdigest(), size_bytes=len(packed),
    )  # fmt: skip
    download.fetch(file, tmp_path / "x.gz")
    assert (tmp_path / "x.gz").read_bytes() == packed


# --- mirrors, attempts, waits ------------------------------------------------------------------------------


def test_mirrors_in_order(server: Loopback, tmp_path: Path) -> None:
    urls = [
        server.serve("/a", status(404)), server.serve("/b", honest(OTHER)), server.serve("/c", honest()),
        server.serve("/d", honest()),
    ]  # fmt: skip
    got = get(remote(*urls), tmp_path / "x.bin")
    assert len(got.notes) == 2 and "404" in got.notes[0] and "mirror 3 of 4" in got.notes[1]
    assert [request["path"] for request in server.requests] == ["/a", "/b", "/c"]


def test_the_next_mirror_resumes(server: Loopback, tmp_path: Path) -> None:
    one = server.serve("/one", honest(cut=HALF), status(404))
    two = server.serve("/two", honest(cut=100_000), honest())
    get(remote(one, two), tmp_path / "x.bin")
    assert server.ranges()[2:] == ["bytes=500000-", "bytes=600000-"]


@pytest.mark.parametrize(
    "wrong", [status(404), send(200, b"log in", Content_Type="text/html"), send(200, b"short")]
)
def test_a_wrong_answer_does_not_cost_the_partial_file(
    server: Loopback, tmp_path: Path, wrong: Answer
) -> None:
    one = server.serve("/one", honest(cut=HALF), wrong)
    two, three = server.serve("/two", wrong), server.serve("/three", honest())
    get(remote(one, two, three), tmp_path / "x.bin")
    assert server.ranges()[-1] == "bytes=500000-"


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_waits_grow_and_end(server: Loopback, tmp_path: Path, waits: list[float], code: int) -> None:
    with pytest.raises(KdError, match=f"answers {code}"):
        download.fetch(remote(server.serve("/x", status(code))), tmp_path / "x.bin")
    assert waits == [1.0, 2.0, 4.0] and len(server.requests) == 4


def test_retry_after_is_respected_up_to_a_bound(server: Loopback, tmp_path: Path, waits: list[float]) -> None:
    for asked in (["7", "99999999999999999999"], ["Wed, 21 Oct 2015 07:28:00 GMT", "soon", "²"]):
        answers = [status(503, Retry_After=text) for text in asked]
        get(remote(server.serve("/x", *answers, honest())), tmp_path / "x.bin")
        (tmp_path / "x.bin").unlink()
    assert waits == [7.0, 60.0, 1.0, 2.0, 4.0]


def test_attempts_are_counted_from_the_last_progress(
    server: Loopback, tmp_path: Path, waits: list[float]
) -> None:
    url = server.serve("/x", *(honest(cut=100_000) for _ in range(10)), honest())
    get(remote(url), tmp_path / "x.bin")
    assert waits == [1.0] * 10
    (tmp_path / "x.bin").unlink()
    waits.clear()
    server.serve("/x", send(200, CONTENT, cut=HALF))  # ignores ranges: starting over is no progress
    with pytest.raises(KdError, match="cannot fetch"):
        download.fetch(remote(url), tmp_path / "x.bin")
    assert waits == [1.0, 2.0, 4.0]


def test_an_unreachable_server(tmp_path: Path, waits: list[float]) -> None:
    with pytest.raises(KdError, match=r"cannot fetch http://127.0.0.1:9/x") as caught:
        download.fetch(remote("http://127.0.0.1:9/x"), tmp_path / "x.bin")
    assert len(waits) == 3 and "proxy" in caught.value.hint


def test_a_silent_server_is_asked_again(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", httpx.Timeout(0.3, connect=15.0))
    url = server.serve("/x", honest(hold=HALF), honest())
    got = get(remote(url), tmp_path / "x.bin")
    assert server.ranges() == [None, "bytes=500000-"]
    assert "timed out" in got.notes[0]


def test_proxies_from_the_environment(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.serve("one.example:443", status(403))
    monkeypatch.setenv("HTTPS_PROXY", server.url)
    with pytest.raises(KdError, match=r"cannot fetch https://one.example/x: 403"):
        download.fetch(remote("https://one.example/x"), tmp_path / "x.bin")
    assert {request["path"] for request in server.requests} == {"one.example:443"}
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")  # not used for loopback
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    get(remote(server.serve("/x", honest())), tmp_path / "x.bin")
    monkeypatch.setenv("HTTPS_PROXY", "gopher://127.0.0.1:9")
    with pytest.raises(KdError, match="proxy settings cannot be used"):
        download.fetch(remote("https://one.example/x"), tmp_path / "y.bin")


# --- interruptions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_partial_download_survives_an_interruption(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    """The event stands for the write, which only a full disk makes fail."""
    monkeypatch.setattr(download, "EVENT_SECONDS", 0)
    file, target = remote(server.serve("/x", honest())), tmp_path / "x.bin"

    def interrupt(event: Event) -> None:
        if isinstance(event, Progress) and event.done >= HALF:
            raise stop

    with pytest.raises(KdError if isinstance(stop, OSError) else KeyboardInterrupt):
        download.fetch(file, target, on_event=interrupt)
    _, kept = download.inspect(file, target)
    assert kept >= HALF and not target.exists()
    get(file, target)
    assert server.ranges() == [None, f"bytes={kept}-"]


def test_a_process_that_waited_finds_the_file(tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    lock = files.locked(tmp_path / ".x.bin.lock", lambda: pytest.fail("waits"))
    lock.__enter__()

    def end(event: Event) -> None:
        assert isinstance(event, Note) and "waiting" in event.text
        target.write_bytes(CONTENT)
        lock.__exit__(None, None, None)

    assert download.fetch(remote(), target, on_event=end) == "present"


def test_the_catalogue_is_complete() -> None:
    """Every address is https; every file has a hash; every data set a size; no two files share a place."""
    places = set()
    for name, entry in DOWNLOADS.items():
        for file in entry:
            assert file.urls and all(url.startswith("https://") for url in file.urls)
            assert all(url.endswith(Path(file.name).name) for url in file.urls) or name == "nin"
            assert file.sha256 or file.git_blob_sha1
            places.add((file.folder, file.name))
            if file.folder == "data":
                assert file.size_bytes and len(bytes.fromhex(file.sha256 or "")) == 32 and len(file.urls) > 1
    assert len(places) == sum(map(len, DOWNLOADS.values()))
    assert {"cifar10", "cifar100", "svhn", "mnist", "fashion-mnist"} <= set(DOWNLOADS)
