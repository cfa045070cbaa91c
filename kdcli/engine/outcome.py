"""Records of a finished run: the provenance in `student.pt`, and `result.json`."""

from typing import Any

from kdcli import __version__, models
from kdcli.engine.plan import RunPlan
from kdcli.engine.records import Evaluation, RunResult, Unlabelled
from kdcli.engine.run_dir import RunDir
from kdcli.engine.state import State
from kdcli.models import Classifier


def provenance_of(plan: RunPlan, run: RunDir, evaluation: Evaluation | None) -> dict[str, Any]:
    """Origin of a student: plain JSON values, read again by `identity.recorded_inputs`."""
    config, teacher, data = plan.config, plan.teacher, plan.data
    unlabelled = _unlabelled(plan)
    return {
        "kind": "student" if teacher else "model",
        "method": config.method,
        "method_sha256": dict(plan.source_digests),
        "student": config.student,
        "student_sha256": plan.inputs.get("student"),
        "teacher": teacher.record() if teacher else None,
        "data": {
            "spec": data.spec,
            "label": data.label,
            "image_size": config.image_size,
            "val_fraction": config.val_fraction,
            "skip_broken": config.skip_broken,
            "fingerprint_train": data.train.fingerprint,
            "fingerprint_test": data.test.fingerprint,
            "unlabelled": unlabelled.to_json() if unlabelled else None,
        },
        "seed": config.seed,
        "epochs": config.epochs,
        "test_accuracy": evaluation.accuracy if evaluation else None,
        "agreement": evaluation.agreement if evaluation else None,
        "run": run.path.name,
        "kd_version": __version__,
    }


def result_of(
    plan: RunPlan,
    run: RunDir,
    student: Classifier,
    state: State,
    val_accuracy: float | None,
    evaluation: Evaluation | None,
) -> RunResult:
    """Figures of a finished run."""
    config, seconds = plan.config, state.seconds
    return RunResult(
        run=run,
        method=config.method,
        student=config.student,
        seed=config.seed,
        epochs=config.epochs,
        parameters=models.parameter_count(student.network),
        val_accuracy=val_accuracy,
        test=evaluation,
        teacher_passes=plan.teacher.passes if plan.teacher else 0,
        seconds=seconds,
        images_per_s=len(plan.train_samples) * config.epochs / seconds if seconds else 0.0,
        unlabelled=_unlabelled(plan),
        resumed_with_differences=tuple(state.marks),
    )


def _unlabelled(plan: RunPlan) -> Unlabelled | None:
    images, path = plan.data.unlabelled, plan.config.unlabelled
    if images is None:
        return None
    spec = None if path is None else path.as_posix()
    return Unlabelled(spec=spec, count=len(images), fingerprint=images.fingerprint)
