"""Exports shared by the tests of deploy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kdcli.deploy.bench import benchmark
from kdcli.deploy.export import ExportResult, exporter
from kdcli.models import Classifier
from tests.deploy.helpers import cached_to_onnx, classifier, exported


@pytest.fixture(scope="session", autouse=True)
def translations() -> Iterator[None]:
    """Translate equal networks once."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (exporter, benchmark):
            patch.setattr(module, "to_onnx", cached_to_onnx)
        yield


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, ExportResult]:
    model = classifier("lenet-caffe")
    return model, exported(tmp_path_factory.mktemp("plain"), model)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, ExportResult]:
    model = classifier("convnet-tiny", "gcn-zca", "bgr")
    return model, exported(tmp_path_factory.mktemp("whole"), model, with_preprocessing=True)


@pytest.fixture(scope="session")
def whitened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, ExportResult]:
    model = classifier("lenet-caffe", "gcn-zca")
    folder = tmp_path_factory.mktemp("int8")
    return model, exported(folder, model, int8=True, with_preprocessing=True, calibration_images=20)
