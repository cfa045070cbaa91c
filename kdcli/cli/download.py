"""`kd download`."""

from __future__ import annotations

import difflib
import shlex
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from kdcli.base import units
from kdcli.base.config import DownloadConfig, make
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.files import expand
from kdcli.cli import _ui
from kdcli.cli._options import options_of
from kdcli.cli.app import Terminated
from kdcli.data import catalog
from kdcli.data.catalog import DOWNLOADS, RemoteFile

if TYPE_CHECKING:
    from kdcli.data.download import FetchResult, LocalState

ALL = "all"
Wanted = list[tuple[RemoteFile, Path]]
_NEXT = {
    "cifar10": "kd train --method ce",
    "cifar100": "kd train --method ce --data cifar100",
    "svhn": "kd train --method ce --data svhn",
    "mnist": "kd train --method ce --data mnist",
    "fashion-mnist": "kd train --method ce --data fashion-mnist",
    "nin": "kd convert-caffe {weights}/cifar10_nin.caffemodel",
    "seed-weights": "kd convert-caffe {weights}/teacher.npy",
}
_DONE = {"present": "already there", "downloaded": "downloaded", "copied": "copied"}


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
    names = _names(what)
    wanted = [(remote, _folder(remote, config) / remote.name) for name in names for remote in DOWNLOADS[name]]
    sources = _sources(what, wanted, config.source)
    wanted = [(remote, target) for remote, target in wanted if remote.name in sources]
    if config.dry_run:
        _list(wanted, sources)
        return
    results: list[FetchResult] = []
    failures: list[tuple[RemoteFile, KdError]] = []
    for remote, target in wanted:
        try:
            results.append(_fetch(remote, target, sources[remote.name], _command(what, config)))
        except Interrupted:
            raise
        except KdError as problem:
            failures.append((remote, problem))
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


def _fetch(remote: RemoteFile, target: Path, source: str | None, command: str) -> FetchResult:
    """One file, with a bar.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; it says what is kept, and that `command` goes on from there.
    """
    from kdcli.data import download as downloads

    try:
        with _ui.progress() as on_event:
            result = downloads.fetch(remote, target, source=source, on_event=on_event)
    except (KeyboardInterrupt, Terminated) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else 143
        state = downloads.inspect(remote, target)
        if state.status != "partial":
            raise Interrupted("stopped", f"{command} begins again.", exit_code=code) from stop
        raise Interrupted(
            f"stopped: {units.size(state.partial_bytes)} of {remote.name} are kept in {state.partial.as_posix()}",
            f"{command} goes on from there.",
            exit_code=code,
        ) from stop
    _ui.say(
        f"{result.path.as_posix()}  {units.size(result.size_bytes)}  {_DONE[result.status]}, hash verified"
    )
    return result


def _command(what: str, config: DownloadConfig) -> str:
    """The command as it was typed, to be typed again."""
    words = ["kd", "download", what]
    for flag, name in (("--from", "source"), ("--data-dir", "data_dir"), ("--weights-dir", "weights_dir")):
        value = getattr(config, name)
        if value != DownloadConfig.model_fields[name].default:
            words += [flag, str(value)]
    return shlex.join(words)


def _list(wanted: Wanted, sources: dict[str, str | None]) -> None:
    """What would be fetched; nothing is asked of any server."""
    from kdcli.data import download as downloads

    states = [downloads.inspect(remote, target) for remote, target in wanted]
    missing = [
        None if remote.size_bytes is None else remote.size_bytes - state.partial_bytes
        for (remote, _), state in zip(wanted, states, strict=True)
        if state.status != "present"
    ]
    known = [size for size in missing if size is not None]
    listed = list(zip(wanted, states, strict=True))
    _ui.table(
        ["file", "from", "state", "size"],
        [
            [
                target.as_posix(),
                _origin(remote, sources[remote.name]),
                _state(state),
                "unknown" if remote.size_bytes is None else units.size(remote.size_bytes),
            ]
            for (remote, target), state in listed
        ],
        left=3,
    )
    unknown = len(missing) - len(known)
    rest = f" and {unknown} file{'s' * (unknown > 1)} of unknown size" if unknown else ""
    _ui.say(f"to fetch: {units.size(sum(known))}{rest}")
    if _ui.settings.json:
        _ui.json(
            {
                "dry_run": True,
                "files": [
                    {
                        "name": remote.name,
                        "path": target.as_posix(),
                        "status": state.status,
                        "size_bytes": remote.size_bytes,
                        "kept_bytes": state.partial_bytes,
                        "from": [sources[remote.name]] if sources[remote.name] else list(remote.urls),
                    }
                    for (remote, target), state in listed
                ],
                "to_fetch_bytes": sum(known),
                "unknown_sizes": unknown,
            }
        )


def _state(state: LocalState) -> str:
    return {
        "present": "there",
        "partial": f"{units.size(state.partial_bytes)} there",
        "absent": "to fetch",
        "other": "another file, to replace",
    }[state.status]


def _origin(remote: RemoteFile, source: str | None) -> str:
    if source is not None:
        return source
    return next((urlsplit(url).hostname or url for url in remote.urls), "")


def _names(what: str) -> list[str]:
    if what == ALL:
        return [name for name in DOWNLOADS if name in catalog.ALL]
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


def _sources(what: str, wanted: Wanted, source: str | None) -> dict[str, str | None]:
    """Where each file comes from (None: its mirrors); a file that is left out stays away.

    Raises:
        UsageError: --from does not say which file it stands for.
    """
    from kdcli.data import download as downloads

    if source is None:
        return {remote.name: None for remote, _ in wanted}
    several = f"{what} has {len(wanted)} files"
    if downloads.is_url(source):
        if source.endswith("/"):
            return {remote.name: source + PurePosixPath(remote.name).name for remote, _ in wanted}
        if len(wanted) > 1:
            raise UsageError(
                f"{several}: --from {source} is one address",
                'End it with "/" if all of them lie below it under their own names, or name one target.',
            )
        return {wanted[0][0].name: source}
    path = expand(source)
    if path.is_dir():
        here: dict[str, str | None] = {
            remote.name: str(path / name)
            for remote, _ in wanted
            for name in (PurePosixPath(remote.name).name, remote.name)
            if (path / name).is_file()
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
        if downloads.is_intact(remote, path):
            return {remote.name: source}
    raise KdError(
        f"{path} is none of the files of {what}: its hash is none of theirs",
        "Files wanted: " + ", ".join(remote.name for remote, _ in wanted) + ".",
    )


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "download",
        epilog="[bold]kd download nin[/bold]\n\n[bold]kd download cifar10 --from ~/cifar10.tar.gz[/bold]\n\n"
        "[bold]kd download mnist --dry-run[/bold]",
    )(download)
