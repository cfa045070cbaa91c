"""One mirror, until it has given the file or it is clear that it will not."""

from __future__ import annotations

import time
from collections.abc import Callable

from kdcli.base.errors import KdError
from kdcli.base.events import Note
from kdcli.data.catalog import RemoteFile
from kdcli.data.fetch.transfer import Job, StartOverError, TransientError, from_hint, shown, transfer

ATTEMPTS = 5  # without getting further
ATTEMPTS_UNREACHABLE = 2  # another mirror, or the user, is quicker than waiting for this one
PROGRESS_BYTES = 1 << 20  # getting further: so much more than ever before
BACK_OFF_S = 1.0  # then 2, 4, 8
MAX_WAIT_S = 60.0  # also where a server asks for more


def pause(seconds: float) -> None:
    """Wait; Ctrl-C ends it."""
    time.sleep(seconds)


def get(job: Job, url: str, is_whole: Callable[[], bool]) -> None:
    """Get a file's bytes from one mirror into its partial.

    The number of attempts is bounded: each must get further than all before it, or is counted.

    Args:
        is_whole: whether the partial has the file's hash.

    Raises:
        KdError: this mirror will not give the file; what it gave is kept if it may be the file's beginning.
        OSError: it cannot be written.
    """
    partial, ranges, from_zero = job.partial, True, False
    failures, furthest = 0, partial.size
    while True:
        try:
            continued = transfer(job, url, ranges=ranges)
        except StartOverError as problem:  # at most once: without ranges there is no cause for it but a lie
            if not ranges:
                raise KdError(f"{shown(url)}: {problem}", from_hint(job.remote)) from problem
            job.on_event(Note(f"{job.remote.name}: {problem}; starting over."))
            partial.drop()
            ranges = False
        except TransientError as problem:
            if partial.size >= furthest + PROGRESS_BYTES:
                failures, furthest = 0, partial.size
            failures += 1
            if failures >= (ATTEMPTS_UNREACHABLE if problem.unreachable else ATTEMPTS):
                raise KdError(
                    str(problem), "Check the network and the proxy settings. " + from_hint(job.remote)
                ) from problem
            wait = min(max(BACK_OFF_S * 2 ** (failures - 1), problem.retry_after_s), MAX_WAIT_S)
            job.on_event(Note(f"{problem}; trying again in {wait:.0f} s."))
            pause(wait)
        else:
            if is_whole():
                return
            partial.drop()
            if not continued or from_zero:
                raise wrong(job.remote, shown(url))
            from_zero = True
            job.on_event(
                Note(f"{job.remote.name}: what was gone on with is not the file; fetching it from its start.")
            )


def wrong(remote: RemoteFile, origin: str) -> KdError:
    """The error for a file with another hash."""
    wanted = f"SHA-256 {remote.sha256}" if remote.sha256 else f"git blob SHA-1 {remote.git_blob_sha1}"
    return KdError(
        f"{origin} is not {remote.name}: its hash is not {wanted}",
        "The file there has changed, is damaged, or was swapped; it was not kept. " + from_hint(remote),
    )
