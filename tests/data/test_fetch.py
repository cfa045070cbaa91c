"""Downloads from a server on loopback that cuts, lies, stalls and redirects; and nothing wrong gets a name."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import shutil
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from kdcli.base import files
from kdcli.base.errors import KdError
from kdcli.base.events import Event, Note, Progress
from kdcli.data import fetch
from kdcli.data.catalog import DOWNLOADS, RemoteFile
from kdcli.data.fetch import retry, transfer
from kdcli.data.fetch.partial import Partial
from tests.loopback import CONTENT, Answer, Loopback, honest, send, serving, status

SHA256 = hashlib.sha256(CONTENT).hexdigest()
BLOB = hashlib.sha1(b"blob 1024000\0" + CONTENT).hexdigest()
OTHER = CONTENT[::-1]
HALF = 500_000


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
    """No proxies, and no waiting: what would have been waited, in seconds."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    seconds: list[float] = []
    monkeypatch.setattr(retry, "pause", seconds.append)
    return seconds


def remote(*urls: str, size: int | None = 1_024_000, blob: bool = False) -> RemoteFile:
    if blob:
        return RemoteFile("x.bin", "data", urls, git_blob_sha1=BLOB, size_bytes=size)
    return RemoteFile("x.bin", "data", urls, sha256=SHA256, size_bytes=size)


class Got(NamedTuple):
    result: fetch.FetchResult
    notes: list[str]


def get(file: RemoteFile, target: Path, **options: Any) -> Got:
    seen: list[Event] = []
    result = fetch.fetch(file, target, on_event=seen.append, **options)
    assert target.read_bytes() == CONTENT
    return Got(result, [event.text for event in seen if isinstance(event, Note)])


def left(folder: Path) -> list[str]:
    """What is in a folder, but for the lock, which stays."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def leave_part(file: RemoteFile, target: Path, server: Loopback, **answer: Any) -> None:
    """Half of the file, as a download that was cut off leaves it."""
    url = file.urls[0]
    path = url.removeprefix(server.url)
    after = server.script.get(path)
    server.serve(path, honest(cut=HALF, **answer), status(404))
    with pytest.raises(KdError, match="404"):
        fetch.fetch(RemoteFile("x.bin", "data", (url,), SHA256, size_bytes=file.size_bytes), target)
    assert Partial(file, target).size == HALF
    server.requests.clear()
    if after is not None:
        server.script[path] = after


# --- a whole file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blob", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_a_right_file_arrives_once(server: Loopback, tmp_path: Path, moved: bool, blob: bool) -> None:
    url = server.serve("/good", honest())
    if moved:
        url = server.serve("/moved", status(301, Location="/good")).replace("127.0.0.1", "localhost")
    seen: list[Event] = []
    target = tmp_path / "new" / "x.bin"
    found = fetch.fetch(remote(url, blob=blob), target, on_event=seen.append)
    assert (found.path, found.status, found.size_bytes) == (target, "downloaded", 1_024_000)
    assert target.read_bytes() == CONTENT and left(target.parent) == ["x.bin"]
    assert seen[0] == Progress("x.bin", 0, 1_024_000, "bytes")
    assert seen[-1] == Progress("x.bin", 1_024_000, 1_024_000, "bytes")
    again = fetch.fetch(remote("https://nowhere.invalid/x", blob=blob), target)
    assert again.status == "present"


@pytest.mark.parametrize(
    ("answer", "size", "message"),
    [
        (honest(OTHER), 1_024_000, "its hash is not SHA-256"),
        (honest(OTHER), None, "its hash is not SHA-256"),
        (status(404), 1_024_000, "404"),
        (status(304), 1_024_000, "304"),
        (send(206, CONTENT, Content_Range="bytes 0-1023999/1024000"), 1_024_000, "206"),
        (send(200, bytes(3 << 20), length=-1), 1_024_000, "larger than the 1,024,000 bytes"),
        (honest(), 1_023_999, "larger than"),
        (honest(), 1_024_001, "1,024,000 bytes instead of 1,024,001"),
        (send(200, CONTENT, Content_Type="text/html; charset=utf-8"), 1_024_000, "answers with a web page"),
        (status(302, Location="http://example.org/x"), 1_024_000, "it is redirected to not an https"),
        (status(302, Location="file:///etc/passwd"), 1_024_000, "refuses file:"),
        (status(302, Location="/x"), 1_024_000, "redirects more than 5 times"),
        (send(200, b"no gzip", Content_Encoding="gzip"), 1_024_000, "cannot fetch"),
    ],
)
def test_what_is_wrong_is_asked_for_once_and_leaves_nothing(
    server: Loopback, tmp_path: Path, waits: list[float], answer: Answer, size: int | None, message: str
) -> None:
    with pytest.raises(KdError, match=message) as caught:
        fetch.fetch(remote(server.serve("/x", answer), size=size), tmp_path / "x.bin")
    assert caught.value.hint
    assert waits == []
    assert left(tmp_path) == []


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
    monkeypatch.setattr(httpx.Client, "stream", lambda *_, **__: pytest.fail("contacted"))
    with pytest.raises(KdError, match=r"refuses|no address"):
        fetch.fetch(remote(), tmp_path / "x", source=url)


def answered_by(monkeypatch: pytest.MonkeyPatch, answer: Callable[[httpx.Request], httpx.Response]) -> None:
    """All addresses are answered by a function, https too."""
    real = httpx.Client

    def client(**options: Any) -> httpx.Client:
        return real(transport=httpx.MockTransport(answer), follow_redirects=False)

    monkeypatch.setattr(httpx, "Client", client)


@pytest.mark.parametrize("where", ["http://mirror.example/x", "http://127.0.0.1:9/x", "//mirror.example/x"])
def test_https_is_never_left_for_http(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        if request.url.path == "/start":
            return httpx.Response(302, headers={"Location": where})
        return httpx.Response(200, content=iter([CONTENT]))

    answered_by(monkeypatch, answer)
    file = remote("https://one.example/start")
    if where.startswith("http:"):
        with pytest.raises(KdError, match=f"refuses {where}: it is redirected to not an https address"):
            fetch.fetch(file, tmp_path / "x.bin")
        assert asked == ["https://one.example/start"]
    else:
        get(file, tmp_path / "x.bin")
        assert asked[1:] == ["https://mirror.example/x"]


def test_a_password_is_not_repeated(server: Loopback, tmp_path: Path) -> None:
    url = server.serve("/x", honest(cut=HALF), status(404)).replace("//", "//me:secret@")
    with pytest.raises(KdError, match="404") as caught:
        fetch.fetch(remote(url), tmp_path / "x.bin")
    assert "secret" not in caught.value.message + caught.value.hint
    assert "secret" not in (tmp_path / ".x.bin.partial.json").read_text()
    assert server.requests[0]["authorization"] == "Basic bWU6c2VjcmV0"


def test_a_wrong_file_is_replaced_only_by_a_right_one(server: Loopback, tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    target.write_bytes(b"mine")
    with pytest.raises(KdError):
        fetch.fetch(remote(server.serve("/bad", honest(OTHER))), target)
    assert target.read_bytes() == b"mine"
    assert fetch.look(remote(), target).status == "other"
    got = get(remote(server.serve("/good", honest())), target)
    assert got.result.status == "downloaded" and "will be replaced" in got.notes[0]


def test_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "out" / "x.bin"
    source.write_bytes(CONTENT)
    assert get(remote(), target, source=str(source)).result.status == "copied"
    source.write_bytes(CONTENT[:-1] + b"!")
    target.unlink()
    for file in (remote(), remote(blob=True)):
        with pytest.raises(KdError, match="its hash is not"):
            fetch.fetch(file, target, source=str(source))
    with pytest.raises(KdError, match="no such file"):
        fetch.fetch(remote(), target, source=str(tmp_path / "absent"))
    source.write_bytes(CONTENT[:-1])
    with pytest.raises(KdError, match="1,023,999 bytes instead of"):
        fetch.fetch(remote(), target, source=str(source))
    assert left(target.parent) == []

    def denied(*args: Any, **options: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(KdError, match=r"cannot read .*source: Permission denied"):
        fetch.fetch(remote(), target, source=str(source))


def test_no_place_no_hash_no_address(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.serve("/x", honest())
    with pytest.raises(KdError, match="is a folder"):
        fetch.fetch(remote(url), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(KdError, match="cannot write"):
        fetch.fetch(remote(url), tmp_path / "file" / "x")
    with pytest.raises(KdError, match="no hash is known"):
        fetch.fetch(RemoteFile("x", "data", (url,)), tmp_path / "y")
    with pytest.raises(KdError, match="no address is known"):
        fetch.fetch(remote(), tmp_path / "y")
    (tmp_path / "z").write_bytes(CONTENT)
    monkeypatch.setattr(fetch, "is_right", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(KdError, match=r"cannot read .*z: denied"):
        fetch.look(remote(), tmp_path / "z")


# --- a part ------------------------------------------------------------------------------------------------


def test_a_cut_download_goes_on_where_it_was(server: Loopback, tmp_path: Path, waits: list[float]) -> None:
    url = server.serve("/x", honest(cut=HALF), honest(cut=200_000), honest())
    got = get(remote(url), tmp_path / "x.bin")
    assert server.ranges() == [None, "bytes=500000-", "bytes=700000-"]
    assert [request.get("if-range") for request in server.requests] == [None, '"one"', '"one"']
    assert waits == [1.0, 2.0] and all("trying again" in note for note in got.notes)
    assert left(tmp_path) == ["x.bin"]


def test_a_part_outlives_its_process_and_is_named(server: Loopback, tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    file = remote(server.serve("/x", honest()))
    assert fetch.look(file, target).status == "absent"
    leave_part(file, target, server)
    assert left(tmp_path) == [".x.bin.partial", ".x.bin.partial.json"]
    state = fetch.look(file, target)
    assert (state.status, state.kept_bytes, state.kept) == ("partial", HALF, tmp_path / ".x.bin.partial")
    get(file, target)
    assert server.ranges() == ["bytes=500000-"]
    assert fetch.look(file, target).status == "present" and left(tmp_path) == ["x.bin"]


def test_the_rest_may_come_in_pieces(server: Loopback, tmp_path: Path) -> None:
    file = remote(server.serve("/x", honest(most=300_000)))
    leave_part(file, tmp_path / "x.bin", server)
    get(file, tmp_path / "x.bin")
    assert server.ranges() == ["bytes=500000-", "bytes=800000-"]


REST = CONTENT[HALF:]
RIGHT = "bytes 500000-1023999/1024000"


@pytest.mark.parametrize(
    ("answer", "note"),
    [
        (send(416, Content_Range="bytes */1024000"), "has no byte 500,000"),
        (send(206, REST, ETag='"one"'), "without a Content-Range"),
        (send(206, REST, ETag='"one"', Content_Range="bytes 500000-/1024000"), "without a Content-Range"),
        (send(206, CONTENT, ETag='"one"', Content_Range="bytes 0-1023999/1024000"), "asked for byte 500,000"),
        (send(206, REST, Content_Range="bytes 499999-1023998/1024000"), "asked for byte 500,000"),
        (send(206, b"", Content_Range="bytes 500000-499999/1024000"), "asked for byte 500,000"),
        (send(206, REST + b"!", Content_Range="bytes 500000-1024000/1024000"), "asked for byte 500,000"),
        (send(206, REST + b"!", Content_Range="bytes 500000-1024000/1024001"), "file of 1,024,000 bytes"),
        (send(206, REST + b"!", Content_Range=RIGHT), "but 524001 bytes long"),
        (send(206, REST + b"!", length=-1, Content_Range=RIGHT), "more arrived than the 524,000 bytes"),
        (send(206, REST, ETag='"two"', Content_Range=RIGHT), "has changed"),
    ],
)
def test_who_lies_about_ranges_is_asked_for_the_whole(
    server: Loopback, tmp_path: Path, waits: list[float], answer: Answer, note: str
) -> None:
    file = remote(server.serve("/x", answer, honest()))
    leave_part(file, tmp_path / "x.bin", server)
    waits.clear()
    got = get(file, tmp_path / "x.bin")
    assert server.ranges() == ["bytes=500000-", None]
    assert len(got.notes) == 1 and note in got.notes[0] and "starting over" in got.notes[0]
    assert waits == []


def test_who_has_lied_is_not_asked_for_a_range_again(server: Loopback, tmp_path: Path) -> None:
    lie = send(206, REST, Content_Range="bytes 1-524000/1024000")
    file = remote(server.serve("/x", lie, honest(cut=HALF), honest()))
    leave_part(file, tmp_path / "x.bin", server)
    get(file, tmp_path / "x.bin")
    assert server.ranges() == ["bytes=500000-", None, None]


@pytest.mark.parametrize("ignores", ["range", "changed"])
def test_200_starts_over(server: Loopback, tmp_path: Path, ignores: str) -> None:
    answer = send(200, CONTENT) if ignores == "range" else honest(etag='"two"')
    file = remote(server.serve("/x", answer))
    leave_part(file, tmp_path / "x.bin", server)
    got = get(file, tmp_path / "x.bin")
    assert server.ranges() == ["bytes=500000-"] and got.notes == []  # the same answer is taken whole


def test_a_changed_file_is_noticed_without_etags_too(server: Loopback, tmp_path: Path) -> None:
    """The old half and the new rest are dropped by the hash; the new whole is fetched once, and then refused."""
    file = remote(server.serve("/x", honest(etag="")))
    leave_part(file, tmp_path / "x.bin", server, etag="", body=OTHER)
    got = get(file, tmp_path / "x.bin")
    assert server.ranges() == ["bytes=500000-", None]
    assert len(got.notes) == 1 and "is not the file; fetching it from its start" in got.notes[0]
    (tmp_path / "x.bin").unlink()
    leave_part(file, tmp_path / "x.bin", server, etag="")
    server.serve("/x", honest(OTHER, etag=""))
    with pytest.raises(KdError, match="its hash is not"):
        fetch.fetch(file, tmp_path / "x.bin")
    assert server.ranges() == ["bytes=500000-", None] and left(tmp_path) == []


def test_from_the_start_means_once(server: Loopback, tmp_path: Path) -> None:
    """A part, its wrong rest, again from zero but cut, its wrong rest: enough."""
    wrong = send(206, REST[::-1], Content_Range=RIGHT)
    file = remote(server.serve("/x", wrong, honest(cut=HALF), wrong))
    leave_part(file, tmp_path / "x.bin", server)
    with pytest.raises(KdError, match="its hash is not"):
        fetch.fetch(file, tmp_path / "x.bin")
    assert server.ranges() == ["bytes=500000-", None, "bytes=500000-"]


LONG_AGO = format_datetime(datetime(2020, 1, 1, tzinfo=UTC), usegmt=True)


@pytest.mark.parametrize(
    ("etag", "modified", "condition"),
    [
        ('"strong"', LONG_AGO, '"strong"'),
        ('W/"weak"', LONG_AGO, None),  # a weak one may not be used, and there is one
        ("", LONG_AGO, LONG_AGO),
        ("", "yesterday", None),
        ("", "now", None),
        ("no quotes", "", None),
        ("", "", None),
    ],
)
def test_only_strong_validators_condition_a_range(
    server: Loopback, tmp_path: Path, etag: str, modified: str, condition: str | None
) -> None:
    if modified == "now":  # may change again within its second
        modified = format_datetime(datetime.now(UTC) - timedelta(seconds=2), usegmt=True)
    file = remote(server.serve("/x", honest(etag=etag, modified=modified)))
    leave_part(file, tmp_path / "x.bin", server, etag=etag, modified=modified)
    get(file, tmp_path / "x.bin")
    [request] = server.requests
    assert (request["range"], request.get("if-range")) == ("bytes=500000-", condition)


def test_weak_etags_still_tell_that_a_file_has_changed(server: Loopback, tmp_path: Path) -> None:
    file = remote(server.serve("/x", honest(etag='W/"two"')))
    leave_part(file, tmp_path / "x.bin", server, etag='W/"one"')
    assert "has changed" in get(file, tmp_path / "x.bin").notes[0]


def test_a_size_that_only_the_server_knows_must_stay(server: Loopback, tmp_path: Path) -> None:
    file = remote(server.serve("/x", honest()), size=None)
    leave_part(file, tmp_path / "x.bin", server)
    get(file, tmp_path / "x.bin")
    assert server.ranges() == ["bytes=500000-"]
    (tmp_path / "x.bin").unlink()
    server.serve("/x", send(206, REST, Content_Range="bytes 500000-1023999/1024001"), honest())
    leave_part(file, tmp_path / "x.bin", server)
    assert "is not of a file of 1,024,000" in get(file, tmp_path / "x.bin").notes[0]
    (tmp_path / "x.bin").unlink()
    server.serve("/x", send(206, REST, Content_Range="bytes 500000-1023999/*"))  # allowed by the rules
    leave_part(file, tmp_path / "x.bin", server)
    assert get(file, tmp_path / "x.bin").notes == []


def test_an_answer_without_length_that_is_cut_goes_on(server: Loopback, tmp_path: Path) -> None:
    file = remote(server.serve("/x", honest(cut=HALF, length=-1), honest()))
    got = get(file, tmp_path / "x.bin")
    assert server.ranges() == [None, "bytes=500000-"]
    assert "ended after 500,000 of 1,024,000 bytes" in got.notes[0]


GOOD_NOTE = {
    "wanted": f"sha256:{SHA256}",
    "url": "",
    "etag": '"one"',
    "last_modified": None,
    "total": 1_024_000,
}


@pytest.mark.parametrize(
    "note",
    [
        None,
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 10_000,
        b" " * 20_000 + json.dumps(GOOD_NOTE).encode(),
        {**GOOD_NOTE, "wanted": "sha256:" + "0" * 64},
        {**GOOD_NOTE, "url": 7},
        {**GOOD_NOTE, "etag": '"a"\r\nX: y'},
        {**GOOD_NOTE, "etag": ["x"]},
        {**GOOD_NOTE, "etag": None, "last_modified": "now\n"},
        {**GOOD_NOTE, "etag": None, "last_modified": "soon"},
        {**GOOD_NOTE, "etag": None, "last_modified": 5},
        {**GOOD_NOTE, "total": "many"},
        {**GOOD_NOTE, "total": True},
        {**GOOD_NOTE, "total": -1},
        {name: value for name, value in GOOD_NOTE.items() if name != "total"},
    ],
)
def test_a_part_without_a_good_note_starts_over(
    server: Loopback, tmp_path: Path, note: bytes | dict[str, Any] | None
) -> None:
    file = remote(server.serve("/x", honest()))
    leave_part(file, tmp_path / "x.bin", server)
    beside = tmp_path / ".x.bin.partial.json"
    if note is None:
        beside.unlink()
    elif isinstance(note, bytes):
        beside.write_bytes(note)
    else:
        beside.write_text(json.dumps({**note, "url": file.urls[0] if note["url"] == "" else note["url"]}))
    assert fetch.look(file, tmp_path / "x.bin").status == "absent"
    get(file, tmp_path / "x.bin")
    assert server.ranges() == [None]


def test_the_good_note_is_good(server: Loopback, tmp_path: Path) -> None:
    """What the test above spoils is gone on with when it is not spoilt."""
    file = remote(server.serve("/x", honest()))
    leave_part(file, tmp_path / "x.bin", server)
    (tmp_path / ".x.bin.partial.json").write_text(json.dumps({**GOOD_NOTE, "url": file.urls[0]}))
    get(file, tmp_path / "x.bin")
    assert server.ranges() == ["bytes=500000-"]


def test_a_whole_part_needs_no_server(server: Loopback, tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    file = remote(server.serve("/x", honest()))
    for content, asked in ((CONTENT, []), (OTHER, [None]), (CONTENT + b"!", [None])):
        leave_part(file, target, server)
        (tmp_path / ".x.bin.partial").write_bytes(content)
        assert get(file, target).result.status == "downloaded"
        assert server.ranges() == asked
        target.unlink()


def test_a_link_is_not_written_through(server: Loopback, tmp_path: Path) -> None:
    file = remote(server.serve("/x", honest()))
    leave_part(file, tmp_path / "x.bin", server)
    mine = tmp_path / "mine"
    (tmp_path / ".x.bin.partial").rename(mine)
    (tmp_path / ".x.bin.partial").symlink_to(mine)
    get(file, tmp_path / "x.bin")
    assert mine.read_bytes() == CONTENT[:HALF] and server.ranges() == [None]


# --- compressed on the way -------------------------------------------------------------------------------------


def test_an_answer_that_is_compressed_all_the_same(server: Loopback, tmp_path: Path) -> None:
    packed = gzip.compress(CONTENT)
    url = server.serve(
        "/x", send(200, packed, cut=len(packed) // 2, Content_Encoding="gzip", ETag='"g"'),
        send(200, packed, Content_Encoding="gzip", ETag='"g"'),
    )  # fmt: skip
    get(remote(url), tmp_path / "x.bin")
    assert server.ranges() == [None, None]  # a part of it is not a part of the file
    assert {request["accept-encoding"] for request in server.requests} == {"identity"}


def test_a_gz_that_is_called_compressed_stays_as_it_is(server: Loopback, tmp_path: Path) -> None:
    packed = gzip.compress(CONTENT)
    file = RemoteFile(
        "x.gz", "data", (server.serve("/x", send(200, packed, Content_Encoding="gzip")),),
        hashlib.sha256(packed).hexdigest(), size_bytes=len(packed),
    )  # fmt: skip
    fetch.fetch(file, tmp_path / "x.gz")
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


def test_the_next_mirror_goes_on(server: Loopback, tmp_path: Path) -> None:
    one = server.serve("/one", honest(cut=HALF), status(404))
    two = server.serve("/two", honest(etag='"other"', cut=100_000), honest(etag='"other"'))
    get(remote(one, two), tmp_path / "x.bin")
    assert server.ranges()[2:] == ["bytes=500000-", "bytes=600000-"]
    assert [request.get("if-range") for request in server.requests] == [None, '"one"', None, '"other"']


def test_the_next_mirror_goes_on_only_where_the_size_is_the_same(server: Loopback, tmp_path: Path) -> None:
    for content_range in ("bytes 500000-1023999/*", "bytes 500000-1023999/1024001"):
        one = server.serve("/one", honest(cut=HALF), status(404))
        two = server.serve("/two", send(206, REST, Content_Range=content_range), honest())
        server.requests.clear()
        got = get(remote(one, two, size=None), tmp_path / "x.bin")
        assert server.ranges()[2:] == ["bytes=500000-", None] and "is not of a file" in got.notes[-1]
        (tmp_path / "x.bin").unlink()


def test_a_mirror_that_gave_rubbish_costs_the_next_one_nothing(server: Loopback, tmp_path: Path) -> None:
    one = server.serve("/one", honest(OTHER, cut=HALF), status(404))
    two = server.serve("/two", honest())
    got = get(remote(one, two), tmp_path / "x.bin")
    assert server.ranges()[2:] == ["bytes=500000-", None]
    assert "fetching it from its start" in got.notes[-1]


@pytest.mark.parametrize(
    "wrong", [status(404), send(200, b"log in", Content_Type="text/html"), send(200, b"short")]
)
def test_a_wrong_answer_does_not_cost_what_is_there(server: Loopback, tmp_path: Path, wrong: Answer) -> None:
    one = server.serve("/one", honest(cut=HALF), wrong)
    two, three = server.serve("/two", wrong), server.serve("/three", honest())
    get(remote(one, two, three), tmp_path / "x.bin")
    assert server.ranges()[-1] == "bytes=500000-"


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_waits_grow_and_end(server: Loopback, tmp_path: Path, waits: list[float], code: int) -> None:
    with pytest.raises(KdError, match=f"answers {code}"):
        fetch.fetch(remote(server.serve("/x", status(code))), tmp_path / "x.bin")
    assert waits == [1.0, 2.0, 4.0, 8.0] and len(server.requests) == 5


def test_retry_after_is_heard_up_to_a_bound(server: Loopback, tmp_path: Path, waits: list[float]) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=30), usegmt=True)
    asked = ["7", soon, "99999999999999999999", past]
    url = server.serve("/x", *(status(503, Retry_After=text) for text in asked), honest())
    get(remote(url), tmp_path / "x.bin")
    assert (waits[0], waits[2], waits[3]) == (7.0, 60.0, 8.0) and 20.0 < waits[1] <= 30.0
    server.serve("/x", *(status(503, Retry_After=text) for text in ("soon", "-5", "²")), honest())
    (tmp_path / "x.bin").unlink()
    waits.clear()
    get(remote(url), tmp_path / "x.bin")
    assert waits == [1.0, 2.0, 4.0]


def test_who_gets_further_may_try_on(
    server: Loopback, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PROGRESS_BYTES", 100_000)
    url = server.serve("/x", *(honest(cut=100_000) for _ in range(10)), honest())
    get(remote(url), tmp_path / "x.bin")
    assert waits == [1.0] * 10  # 5 attempts without getting further would have been too many
    (tmp_path / "x.bin").unlink()
    server.serve("/x", honest(cut=19_000))
    with pytest.raises(KdError, match="cannot fetch") as caught:
        fetch.fetch(remote(url), tmp_path / "x.bin")
    assert Partial(remote(), tmp_path / "x.bin").size == 5 * 19_000
    assert "0.1 MB are kept" in caught.value.hint


def test_starting_over_again_and_again_is_not_getting_further(
    server: Loopback, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PROGRESS_BYTES", 100_000)
    url = server.serve("/x", send(200, CONTENT, cut=HALF))
    with pytest.raises(KdError, match="cannot fetch"):
        fetch.fetch(remote(url), tmp_path / "x.bin")
    assert len(waits) == 4 and len(server.requests) == 5


def test_who_cannot_be_reached_is_tried_twice(tmp_path: Path, waits: list[float]) -> None:
    with pytest.raises(KdError, match=r"cannot fetch http://127.0.0.1:9/x") as caught:
        fetch.fetch(remote("http://127.0.0.1:9/x"), tmp_path / "x.bin")
    assert waits == [1.0] and "proxy settings" in caught.value.hint


def test_a_silent_server_is_left_and_asked_for_the_rest(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "TIMEOUT", httpx.Timeout(0.3, connect=15.0))
    url = server.serve("/x", honest(hold=HALF), honest())
    got = get(remote(url), tmp_path / "x.bin")
    assert server.ranges() == [None, "bytes=500000-"]
    assert "nothing arrived for 0.3 s" in got.notes[0]


def test_a_certificate_that_is_not_trusted_is_final(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("verify failed") from ssl.SSLCertVerificationError("self-signed")

    answered_by(monkeypatch, answer)
    with pytest.raises(KdError, match="verify failed") as caught:
        fetch.fetch(remote("https://one.example/x"), tmp_path / "x.bin")
    assert waits == [] and "certificate" in caught.value.hint


def test_more_than_announced_from_the_start_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our HTTP library lets no more through than Content-Length; should it ever, that is noticed."""

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"Content-Length": "9"}, content=iter([b"x" * 10]))

    answered_by(monkeypatch, answer)
    with pytest.raises(KdError, match="more arrived than the 9 bytes"):
        fetch.fetch(remote("https://one.example/x", size=None), tmp_path / "x.bin")


# --- this machine ------------------------------------------------------------------------------------------


def test_space_is_looked_at_first(server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.bin"
    one, two = server.serve("/one", honest()), server.serve("/two", honest())
    leave_part(remote(one), target, server)

    def space(free: int) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(transfer.shutil, "disk_usage", lambda folder: usage)

    real, needed = shutil.disk_usage, 524_000 + transfer.SPARE_BYTES
    space(needed - 1)
    with pytest.raises(KdError, match=r"not enough space in .*: x.bin needs 0.5 MB more") as caught:
        fetch.fetch(remote(one, two), target)
    assert "Free some space" in caught.value.hint
    assert server.requests == [] and Partial(remote(), target).size == HALF
    with pytest.raises(KdError, match="not enough space"):  # a size that only the server knows
        Partial(remote(), target).drop()
        fetch.fetch(remote(one, two, size=None), target)
    assert [request["path"] for request in server.requests] == ["/one"] and left(tmp_path) == []
    (tmp_path / "copy").write_bytes(CONTENT)
    with pytest.raises(KdError, match="not enough space"):
        fetch.fetch(remote(), target, source=str(tmp_path / "copy"))
    monkeypatch.setattr(transfer.shutil, "disk_usage", real)
    leave_part(remote(one), target, server)
    space(needed)
    get(remote(one), target)


def test_a_disk_that_fills_up_keeps_the_part(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The events stand for the write, which nothing but a full disk makes fail."""
    monkeypatch.setattr(transfer, "EVENT_SECONDS", 0)
    url = server.serve("/x", honest())

    def full(event: Event) -> None:
        if isinstance(event, Progress) and event.done >= HALF:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(KdError, match=r"cannot write .*x.bin: No space left on device"):
        fetch.fetch(remote(url), tmp_path / "x.bin", on_event=full)
    assert fetch.look(remote(), tmp_path / "x.bin").kept_bytes >= HALF
    get(remote(url), tmp_path / "x.bin")
    assert len(server.requests) == 2 and server.requests[1]["if-range"] == '"one"'


def test_an_interrupt_keeps_the_part(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "EVENT_SECONDS", 0)
    file = remote(server.serve("/x", honest()))

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done >= HALF:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(file, tmp_path / "x.bin", on_event=stop)
    kept = fetch.look(file, tmp_path / "x.bin").kept_bytes
    assert kept >= HALF and not (tmp_path / "x.bin").exists()
    get(file, tmp_path / "x.bin")
    assert server.ranges() == [None, f"bytes={kept}-"]


def test_a_wait_can_be_interrupted(server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(retry, "pause", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(remote(server.serve("/x", honest(cut=HALF))), tmp_path / "x.bin")
    assert fetch.look(remote(), tmp_path / "x.bin").kept_bytes == HALF


def test_who_had_to_wait_finds_the_file(tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    with contextlib.ExitStack() as other:
        other.enter_context(files.locked(tmp_path / ".x.bin.lock", lambda: pytest.fail("waits")))

        def end(event: Event) -> None:
            assert isinstance(event, Note) and "waiting" in event.text
            target.write_bytes(CONTENT)
            other.close()

        assert fetch.fetch(remote(), target, on_event=end).status == "present"


def test_pause_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    slept: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    retry.pause(2.5)
    assert slept == [2.5]


def test_proxies_from_the_environment(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.serve("one.example:443", status(403))
    monkeypatch.setenv("HTTPS_PROXY", server.url)
    with pytest.raises(KdError, match=r"cannot fetch https://one.example/x: 403"):
        fetch.fetch(remote("https://one.example/x"), tmp_path / "x.bin")
    assert {request["path"] for request in server.requests} == {"one.example:443"}
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")  # what is on this machine goes through none
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    get(remote(server.serve("/x", honest())), tmp_path / "x.bin")
    monkeypatch.setenv("HTTPS_PROXY", "gopher://127.0.0.1:9")
    with pytest.raises(KdError, match="proxy settings cannot be used"):
        fetch.fetch(remote("https://one.example/x"), tmp_path / "y.bin")


def test_the_catalogue_can_be_fetched() -> None:
    """Every address is https; every data set has a size and a SHA-256; no two files share a place."""
    places = set()
    for name, entry in DOWNLOADS.items():
        for file in entry:
            assert file.urls and all(url.startswith("https://") for url in file.urls)
            assert all(url.endswith(Path(file.name).name) for url in file.urls) or name == "nin"
            places.add((file.folder, file.name))
            if file.folder == "data":
                assert file.size_bytes and len(bytes.fromhex(file.sha256 or "")) == 32 and len(file.urls) > 1
    assert len(places) == sum(map(len, DOWNLOADS.values()))
    assert {"cifar10", "cifar100", "svhn", "mnist", "fashion-mnist"} <= set(DOWNLOADS)
