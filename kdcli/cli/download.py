"""`kd download`."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated
from urllib.parse import urlsplit

import typer

from kdcli.base import units
from kdcli.base.config import DownloadConfig, shell_command
from kdcli.base.errors import KdError, UsageError
from kdcli.base.files import expand
from kdcli.base.names import nearest
from kdcli.cli import output
from kdcli.cli.options import command, examples
from kdcli.data import catalog
from kdcli.data.catalog import DOWNLOADS, RemoteFile

ALL = "all"
Files = list[tuple[RemoteFile, Path, str | None]]  # with target, and source or None for the file's mirrors
_TEACHERS = {"nin": "cifar10_nin.caffemodel", "seed-weights": "teacher.npy"}
_STATE = {
    "present": "there",
    "partial": "{kept} there",
    "absent": "to fetch",
    "other": "another file, to replace",
}
EPILOG = examples(
    "kd download nin", "kd download cifar10 --from ~/cifar10.tar.gz", "kd download mnist --dry-run"
)


@command(DownloadConfig)
def download(
    what: Annotated[
        str,
        typer.Argument(
            help=f"Data set or weights; {ALL}: {', '.join(catalog.ALL)}.",
            metavar="[" + "|".join([*DOWNLOADS, ALL]) + "]",
        ),
    ] = ALL,
    *,
    config: DownloadConfig,
) -> None:
    """Download data sets and the Caffe teacher, verified by their hashes.

    Intact files are kept; an interrupted download continues.
    """
    if what not in (*DOWNLOADS, ALL):
        raise UsageError(f"unknown download: {what}", nearest(what, [*DOWNLOADS, ALL]))
    names = [name for name in DOWNLOADS if name in catalog.ALL] if what == ALL else [what]
    remotes = [remote for name in names for remote in DOWNLOADS[name]]
    sources = _sources(what, remotes, config.from_)
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
    data_dir = config.model_dump(include=config.model_fields_set & {"data_dir"})
    whole = [name for name in names if all(remote.name in sources for remote in DOWNLOADS[name])]
    caffe = [config.weights_dir / file for name, file in _TEACHERS.items() if name in whole]
    if caffe:
        output.next_command(shell_command("convert-caffe", data_dir, caffe[0]))
    elif whole:
        output.next_command(shell_command("train", {"method": "ce", "data": whole[0], **data_dir}))


def _fetch(files: Files) -> None:
    """Fetch each file; errors are reported after the others are fetched."""
    from kdcli.data import download as downloads

    fetched: list[dict[str, object]] = []
    failures: dict[str, KdError] = {}
    for remote, target, source in files:
        try:
            status = downloads.fetch(remote, target, source=source, on_event=output.on_event)
        except KdError as problem:
            failures[remote.name] = problem
            continue
        path, size = target.as_posix(), target.stat().st_size
        fetched.append({"path": path, "status": status, "size_bytes": size})
        done = "already there" if status == "present" else status
        output.text(f"{path}  {units.size(size)}  {done}, hash verified")
    failed = [{"name": name, "error": problem.message} for name, problem in failures.items()]
    output.json({"files": fetched, "failed": failed})
    if failures:
        *earlier, last = failures.values()
        for failure in earlier:
            output.error(failure)
        raise last


def _list(files: Files) -> None:
    """Print the files to fetch, without a request to a server."""
    from kdcli.data import download as downloads

    entries, rows = [], []
    to_fetch = unknown = 0
    for remote, target, source in files:
        status, kept_bytes = downloads.inspect(remote, target)
        size = remote.size_bytes
        urls = [source] if source else list(remote.urls)
        entries.append(
            {
                "name": remote.name,
                "path": target.as_posix(),
                "status": status,
                "size_bytes": size,
                "kept_bytes": kept_bytes,
                "from": urls,
            }
        )
        rows.append(
            [
                target.as_posix(),
                urlsplit(urls[0]).hostname or urls[0],
                _STATE[status].format(kept=units.size(kept_bytes)),
                "unknown" if size is None else units.size(size),
            ]
        )
        if status != "present":
            unknown += size is None
            to_fetch += (size or kept_bytes) - kept_bytes
    output.json({"dry_run": True, "files": entries, "to_fetch_bytes": to_fetch, "unknown_sizes": unknown})
    output.table(["file", "from", "state", "size"], rows, left=3)
    rest = f" and {unknown} file{'s' * (unknown > 1)} of unknown size" if unknown else ""
    output.text(f"to fetch: {units.size(to_fetch)}{rest}")


def _sources(what: str, remotes: list[RemoteFile], source: str | None) -> dict[str, str | None]:
    """Source of each file, None for its mirrors; without files that the folder of --from does not have."""
    from kdcli.data import download as downloads

    if source is None:
        return {remote.name: None for remote in remotes}
    if downloads.is_url(source):
        if len(remotes) == 1 and not source.endswith("/"):
            return {remotes[0].name: source}
        folder = source.rstrip("/")
        return {remote.name: f"{folder}/{PurePosixPath(remote.name).name}" for remote in remotes}
    path, names = expand(source), ", ".join(remote.name for remote in remotes)
    if path.is_dir():
        present: dict[str, str | None] = {
            remote.name: str(path / name)
            for remote in remotes
            for name in (PurePosixPath(remote.name).name, remote.name)
            if (path / name).is_file()
        }
        if not present:
            raise KdError(f"{path} holds none of {names}", "Give the folder that holds them, or a file.")
        return present
    if not path.is_file():
        raise KdError(
            f"no such file or folder: {path}", "--from takes a file, a folder or an https:// address."
        )
    for remote in remotes:
        if len(remotes) == 1 or downloads.is_intact(remote, path):
            return {remote.name: source}
    raise KdError(f"{path} is none of the files of {what}: its hash differs", f"Files wanted: {names}.")
