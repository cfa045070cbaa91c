"""Packs: all outputs of a teacher that a run needs, to train without the teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kdcli.base import files, runtime
from kdcli.base.errors import Interrupted, UsageError
from kdcli.base.events import OnEvent, ignore
from kdcli.data import Splits
from kdcli.engine.feed import make_teacher_outputs
from kdcli.engine.fit import single_process
from kdcli.engine.plan import make_plan
from kdcli.methods import TrainConfig
from kdcli.teacher.stored import FORMAT, MADE_WITH


def pack_logits(
    config: TrainConfig, data: Splits, folder: Path, on_event: OnEvent = ignore
) -> dict[str, Any]:
    """Write the outputs of a teacher on the views of the training images, on these plain, and on the test images.

    The folder is that of a cache, in which an interrupted pass continues; `pack.json` completes it.

    Returns the settings of kd train that they are for. Errors are those of `fit`.
    """
    if (folder / "pack.json").exists():
        raise UsageError(f"{folder} is a pack already", "Choose another folder with --output.")
    runtime.set_threads(config.threads, 1)
    plan = make_plan(config.model_copy(update={"cache_dir": folder}), data, single_process(config))
    config, teacher = plan.config, plan.teacher
    assert teacher is not None
    [member, *others] = teacher.members
    if others or teacher.has_stored:
        raise UsageError(
            "a pack has the outputs of one model", "Make a pack of each; kd train takes several --teacher."
        )
    plain = config.model_copy(update={"augment": "none", "views": 1})
    passes = [config] if config.augment == "none" else [config, plain]
    with runtime.stop_on_signals() as stop:
        for each in passes:
            make_teacher_outputs(replace(plan, config=each), on_event, stop)
        if teacher.test_logits(data.test, on_event, lambda: bool(stop)) is None:
            raise Interrupted("stopped", "Rerun the same command to continue.", exit_code=stop.exit_code)
    pool = plan.train_samples
    caches = [
        teacher.cache(member, plan.train, each.augment, each.augment_seed, pool, exact=False)
        for each in passes
    ]
    caches.append(teacher.cache(member, data.test, "none", 0, np.arange(len(data.test)), exact=True))
    made_with = config.model_dump(mode="json", include=MADE_WITH, exclude_none=True)
    made_with["view_seed"] = config.augment_seed
    document = {
        "format": FORMAT,
        "teacher": {"file": member.path.name, "sha256": member.sha256},
        "only_probabilities": config.cache_top_k > 0 or teacher.gives_probabilities,
        "made_with": made_with,
        "manifests": [files.sha256_file(cache.folder / "manifest.json") for cache in caches],
    }
    for lock in (folder / "teacher").rglob("*.lock"):
        lock.unlink()
    files.write_json(folder / "pack.json", document)
    return made_with
