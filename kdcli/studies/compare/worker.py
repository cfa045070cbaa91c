"""One run in a process of its own: `python -m kdcli.studies.compare.worker`, asked on stdin, answering on stdout.

The first line of stdin is a JSON object: `run`, the run's folder, `inputs`, SHA-256 of what it is made of, and either
`config`, its settings, or nothing more, to resume it. Each line of stdout is a JSON object: `progress`, `note` or,
last, `end`. When stdin ends before the run does, whoever asked is dead, and the run saves its state and stops.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from kdcli.base.config import make
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Event, Note, Progress
from kdcli.engine import RunDir, fit
from kdcli.engine.identity import check_unchanged, input_hashes
from kdcli.engine.inputs import load_data
from kdcli.methods import TrainConfig


def main() -> None:
    """Do what stdin asks for."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    def on_event(event: Event) -> None:
        if isinstance(event, Note):
            answer(note=event.text)
        elif isinstance(event, Progress):
            answer(progress=[event.task, event.done, event.total, dict(event.values), event.group])

    asked = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_stop_with_the_asker, daemon=True).start()
    place = RunDir(Path(asked["run"]))
    end: dict[str, Any] = {"status": "finished", "message": "", "hint": "", "exit_code": 0}
    try:
        resume = "config" not in asked
        config = place.read_config() if resume else make(TrainConfig, asked["config"])
        data = load_data(config)
        mine = input_hashes(config, data)
        check_unchanged({name: asked["inputs"].get(name) for name in mine}, mine, asked["run"])
        fit(config, data, resume=place if resume else None, on_event=on_event)
    except KdError as error:
        kind = "failed"
        if isinstance(error, Interrupted | UsageError):
            kind = "stopped" if isinstance(error, Interrupted) else "refused"
        end = {
            "status": kind,
            "message": error.message,
            "hint": error.hint,
            "exit_code": error.exit_code,
        }
    answer(end=end)


def _stop_with_the_asker() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
