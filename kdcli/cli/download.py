"""`kd download`."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer

from kdcli.catalog import DOWNLOADS, RemoteFile
from kdcli.cli import _ui
from kdcli.cli._options import options_of
from kdcli.config import DownloadConfig, make
from kdcli.errors import KdError, UsageError
from kdcli.files import expand

ALL = "all"
_NEXT = {
    "cifar10": "kd train --method ce",
    "nin": "kd convert-caffe {weights}/cifar10_nin.caffemodel",
    "seed-weights": "kd convert-caffe {weights}/teacher.npy",
}
_DONE = {"present": "already there", "downloaded": "downloaded", "copied": "copied"}


@options_of(DownloadConfig)
def download(
    *,
    what: Annotated[
        str, typer.Argument(help="What to fetch.", metavar="[" + "|".join([*DOWNLOADS, ALL]) + "]")
    ] = ALL,
    **options: Any,
) -> None:
    """Fetch datasets and the Caffe teacher, and check that they are what they should be.

    Files that are there already and right are left alone.
    """
    from kdcli import fetch

    config = make(DownloadConfig, options)
    names = _names(what)
    wanted = [(remote, _folder(remote, config) / remote.name) for name in names for remote in DOWNLOADS[name]]
    sources = _sources(what, wanted, config.source)
    results, failures = [], []
    for remote, target in wanted:
        if remote.name not in sources:
            continue
        try:
            with _ui.progress() as on_event:
                result = fetch.fetch(remote, target, source=sources[remote.name], on_event=on_event)
        except KdError as problem:
            failures.append((remote, problem))
            continue
        results.append(result)
        _ui.say(
            f"{result.path.as_posix()}  {_ui.size(result.size_bytes)}  {_DONE[result.status]}, hash verified"
        )
    if _ui.settings.json:
        _ui.json(
            {
                "files": [
                    {"path": r.path.as_posix(), "status": r.status, "size_bytes": r.size_bytes}
                    for r in results
                ],
                "failed": [{"name": remote.name, "error": failed.message} for remote, failed in failures],
            }
        )
    for _, earlier in failures[:-1]:
        _ui.error(earlier)
    if failures:
        raise failures[-1][1]
    _ui.next_command(_NEXT[_next_of(names)].format(weights=config.weights_dir.as_posix()))


def _names(what: str) -> list[str]:
    if what == ALL:
        return list(DOWNLOADS)
    if what in DOWNLOADS:
        return [what]
    near = difflib.get_close_matches(what, [*DOWNLOADS, ALL], n=1)
    raise UsageError(
        f"nothing to download by the name {what}",
        (f"Did you mean {near[0]}? " if near else "") + f"Known are {', '.join([*DOWNLOADS, ALL])}.",
    )


def _next_of(names: list[str]) -> str:
    return "nin" if "nin" in names else names[0]


def _folder(remote: RemoteFile, config: DownloadConfig) -> Path:
    return config.data_dir if remote.folder == "data" else config.weights_dir


def _sources(what: str, wanted: list[tuple[RemoteFile, Path]], source: str | None) -> dict[str, str | None]:
    """Where each file comes from (None: its mirrors); a file that is left out stays away.

    Raises:
        UsageError: --from does not say which file it stands for.
    """
    from kdcli import fetch

    if source is None:
        return {remote.name: None for remote, _ in wanted}
    several = f"{what} has {len(wanted)} files"
    if fetch.is_url(source):
        if source.endswith("/"):
            return {remote.name: source + remote.name for remote, _ in wanted}
        if len(wanted) > 1:
            raise UsageError(
                f"{several}: --from {source} is one address",
                'End it with "/" if all of them lie below it under their own names, or name one target.',
            )
        return {wanted[0][0].name: source}
    path = expand(source)
    if path.is_dir():
        here: dict[str, str | None] = {
            remote.name: str(path / remote.name) for remote, _ in wanted if (path / remote.name).is_file()
        }
        if not here:
            raise KdError(
                f"{path} holds none of {', '.join(remote.name for remote, _ in wanted)}",
                "Give the folder that holds them, or a file.",
            )
        return here
    if len(wanted) == 1:
        return {wanted[0][0].name: source}
    if not path.is_file():
        raise KdError(
            f"no such file or folder: {path}", "--from takes a file, a folder or an https:// address."
        )
    for remote, _ in wanted:
        if fetch.is_right(remote, path):
            return {remote.name: source}
    raise KdError(
        f"{path} is none of the files of {what}: its hash is none of theirs",
        "Files wanted: " + ", ".join(remote.name for remote, _ in wanted) + ".",
    )


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "download",
        epilog="[bold]kd download nin[/bold]\n\n[bold]kd download cifar10 --from ~/cifar10.tar.gz[/bold]",
    )(download)
