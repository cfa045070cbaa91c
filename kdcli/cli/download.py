"""`kd download`."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from kdcli.base import units
from kdcli.base.config import DownloadConfig, make
from kdcli.base.errors import KdError, UsageError
from kdcli.base.files import expand
from kdcli.cli import _ui
from kdcli.cli._options import examples, options_of
from kdcli.data import catalog
from kdcli.data.catalog import DOWNLOADS, RemoteFile

ALL = "all"
Files = list[tuple[RemoteFile, Path, str | None]]  # with target, and source or None for the file's mirrors
_TEACHERS = {"nin": "cifar10_nin.caffemodel", "seed-weights": "teacher.npy"}
_STATUS = {"present": "already there", "downloaded": "downloaded", "copied": "copied"}
_STATE = {
    "present": "there",
    "partial": "{kept} there",
    "absent": "to fetch",
    "other": "another file, to replace",
}
EPILOG = examples(
    "kd download nin",
    "kd download cifar10 --from ~/cifar10.tar.gz",
    "kd download mnist --dry-run",
)


@options_of(DownloadConfig)
def download(
    *,
    what: Annotated[
        str,
        typer.Argument(
            help=f"What to fetch; {ALL}: {', '.join(catalog.ALL)}.",
            metavar="[" + "|".join([*DOWNLOADS, ALL]) + "]",
        ),
    ] = ALL,
    **options: Any,
) -> None:
    """Fetch datasets and the Caffe teacher, and check that they are what they should be.

    Files that are there already and right are left alone; a download that was cut off goes on where it was.
    """
    config = make(DownloadConfig, options)
    if what not in (*DOWNLOADS, ALL):
        raise UsageError(f"unknown download: {what}", f"Choose from {', '.join([*DOWNLOADS, ALL])}.")
    names = [name for name in DOWNLOADS if name in catalog.ALL] if what == ALL else [what]
    remotes = [remote for name in names for remote in DOWNLOADS[name]]
    sources = _sources(what, remotes, config.source)
    folders = {"data": config.data_dir, "weights": config.weights_dir}
    files = [
        (remote, folders[remote.folder] / remote.name, sources[remote.name])
        for remote in remotes
        if remote.name in sources
    ]
    if config.dry_run:
        _list(files)
        return
    _fetch(files)
    name = "nin" if "nin" in names else names[0]
    if name in _TEACHERS:
        _ui.next_command(f"kd convert-caffe {(config.weights_dir / _TEACHERS[name]).as_posix()}")
    else:
        _ui.next_command(f"kd train --method ce --data {name}")


def _fetch(files: Files) -> None:
    """Fetch each file, with a bar; the errors of some are raised after the others are fetched."""
    from kdcli.data import download as downloads

    done: list[dict[str, Any]] = []
    failures: list[tuple[RemoteFile, KdError]] = []
    for remote, target, source in files:
        try:
            with _ui.progress() as on_event:
                status = downloads.fetch(remote, target, source=source, on_event=on_event)
        except KdError as problem:
            failures.append((remote, problem))
            continue
        size = target.stat().st_size
        done.append({"path": target.as_posix(), "status": status, "size_bytes": size})
        _ui.say(f"{target.as_posix()}  {units.size(size)}  {_STATUS[status]}, hash verified")
    if _ui.settings.json:
        failed = [{"name": remote.name, "error": problem.message} for remote, problem in failures]
        _ui.json({"files": done, "failed": failed})
    for _, earlier in failures[:-1]:
        _ui.error(earlier)
    if failures:
        raise failures[-1][1]


def _list(files: Files) -> None:
    """Print what would be fetched, without a request to any server."""
    from kdcli.data import download as downloads

    entries: list[dict[str, Any]] = []
    for remote, target, source in files:
        status, kept_bytes = downloads.inspect(remote, target)
        entries.append(
            {
                "name": remote.name,
                "path": target.as_posix(),
                "status": status,
                "size_bytes": remote.size_bytes,
                "kept_bytes": kept_bytes,
                "from": [source] if source else list(remote.urls),
            }
        )
    missing = [entry for entry in entries if entry["status"] != "present"]
    known = [entry for entry in missing if entry["size_bytes"] is not None]
    unknown = len(missing) - len(known)
    to_fetch = sum(entry["size_bytes"] - entry["kept_bytes"] for entry in known)
    if _ui.settings.json:
        _ui.json({"dry_run": True, "files": entries, "to_fetch_bytes": to_fetch, "unknown_sizes": unknown})
        return
    rows = [
        [
            entry["path"],
            urlsplit(entry["from"][0]).hostname or entry["from"][0],
            _STATE[entry["status"]].format(kept=units.size(entry["kept_bytes"])),
            "unknown" if entry["size_bytes"] is None else units.size(entry["size_bytes"]),
        ]
        for entry in entries
    ]
    _ui.table(["file", "from", "state", "size"], rows, left=3)
    rest = f" and {unknown} file{'s' * (unknown > 1)} of unknown size" if unknown else ""
    _ui.say(f"to fetch: {units.size(to_fetch)}{rest}")


def _sources(what: str, remotes: list[RemoteFile], source: str | None) -> dict[str, str | None]:
    """Source of each file, None for its mirrors; without files that the folder of --from does not have.

    Raises:
        UsageError: --from is one address for several files.
        KdError: --from is a folder or file with none of the files, or does not exist.
    """
    from kdcli.data import download as downloads

    if source is None:
        return {remote.name: None for remote in remotes}
    if downloads.is_url(source) and source.endswith("/"):
        return {remote.name: source + PurePosixPath(remote.name).name for remote in remotes}
    path = expand(source)
    if not downloads.is_url(source) and path.is_dir():
        present: dict[str, str | None] = {
            remote.name: str(path / name)
            for remote in remotes
            for name in (PurePosixPath(remote.name).name, remote.name)
            if (path / name).is_file()
        }
        if not present:
            names = ", ".join(remote.name for remote in remotes)
            raise KdError(f"{path} holds none of {names}", "Give the folder that holds them, or a file.")
        return present
    if len(remotes) == 1:
        return {remotes[0].name: source}
    if downloads.is_url(source):
        raise UsageError(
            f"{what} has {len(remotes)} files: --from {source} is one address",
            'End it with "/" if all of them lie below it under their own names, or name one target.',
        )
    if not path.is_file():
        raise KdError(
            f"no such file or folder: {path}", "--from takes a file, a folder or an https:// address."
        )
    for remote in remotes:
        if downloads.is_intact(remote, path):
            return {remote.name: source}
    raise KdError(
        f"{path} is none of the files of {what}: its hash is none of theirs",
        f"Files wanted: {', '.join(remote.name for remote in remotes)}.",
    )
