"""Networks as Caffe's users leave them: saved in training, with sources and losses of their own, forks' types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format

from kdcli import caffe
from kdcli.base.config import ConvertConfig
from kdcli.base.errors import KdError
from kdcli.base.events import Note
from kdcli.caffe import opencv, schema
from kdcli.models import Classifier
from tests.caffe_files import convert

R = np.random.default_rng(11)
IMAGES = R.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
CONV, CONV_BIAS = R.normal(0, 0.01, (4, 3, 1, 1)), R.normal(0, 0.5, 4)
MEAN, VARIANCE = R.normal(0, 1, 4), R.uniform(0.5, 2, 4)
FC, FC_BIAS = R.normal(0, 0.3, (2, 64)), R.normal(0, 0.5, 2)
BLOBS: dict[str, tuple[np.ndarray, ...]] = {
    "conv": (CONV, CONV_BIAS),
    "bn": (MEAN * 4, VARIANCE * 4, np.array([4.0])),
    "fc": (FC, FC_BIAS),
}
DATA = 'layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TRAIN } }'
CONV_TEXT = """layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 4 kernel_size: 1 } }"""
FC_TEXT = (
    'layer { name: "fc" type: "InnerProduct" bottom: "%s" top: "fc" inner_product_param { num_output: 2 } }'
)
LOSS = (
    'layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" loss_weight: 1 }'
)


def saved(folder: Path, *texts: str, **more: tuple[np.ndarray, ...]) -> Path:
    """A caffemodel of these layers, with the weights of `BLOBS` and `more`."""
    message = schema.NetParameter()
    text_format.Parse("\n".join(texts), message, allow_unknown_field=True)
    for layer in message.layer:
        for values in {**BLOBS, **more}.get(layer.name, ()):
            blob = layer.blobs.add()
            blob.shape.dim.extend(values.shape)
            blob.data.append(values.astype("<f4").tobytes())
    path = folder / "net.caffemodel"
    path.write_bytes(message.SerializeToString())
    return path


def converted(path: Path, **options: Any) -> tuple[Classifier, list[str]]:
    notes: list[str] = []
    classifier = convert(
        path,
        ConvertConfig(preprocess="none", **options),
        train_images=IMAGES,
        on_event=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    return classifier, notes


def logits(path: Path, **options: Any) -> np.ndarray:
    with torch.inference_mode():
        return converted(path, **options)[0](torch.from_numpy(IMAGES)).numpy()


def wanted(*, normalised: bool) -> np.ndarray:
    """conv, BatchNorm with the kept statistics if any, inner product, in float64."""
    bgr = IMAGES[..., ::-1].astype(float)
    maps = np.einsum("nyxc,oc->noyx", bgr, CONV[:, :, 0, 0]) + CONV_BIAS[:, None, None]
    if normalised:
        maps = (maps - MEAN[:, None, None]) / np.sqrt(VARIANCE + 1e-5)[:, None, None]
    return maps.reshape(5, -1) @ FC.T + FC_BIAS


def agrees(path: Path) -> bool:
    pytest.importorskip("cv2")
    return opencv.compare_logits(converted(path)[0], path, None, IMAGES).holds


@pytest.mark.parametrize("top", ["conv", "bn"])
def test_batch_norm_that_a_solver_recorded_for_training_alone_is_used(top: str, tmp_path: Path) -> None:
    bn = f"""layer {{ name: "bn" type: "BatchNorm" bottom: "conv" top: "{top}" phase: TRAIN
      include {{ phase: TRAIN }} batch_norm_param {{ use_global_stats: false }} }}"""
    path = saved(tmp_path, DATA, CONV_TEXT, bn, FC_TEXT % top, LOSS)
    np.testing.assert_allclose(logits(path), wanted(normalised=True), rtol=1e-5, atol=1e-5)
    assert agrees(path)


def test_a_prototxt_drops_what_is_for_training_alone(tmp_path: Path) -> None:
    bn = 'layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" include { phase: TRAIN } }'
    texts = (DATA, CONV_TEXT, bn, FC_TEXT % "conv", LOSS)
    (tmp_path / "net.prototxt").write_text("\n".join(texts))
    found = logits(saved(tmp_path, *texts), prototxt=tmp_path / "net.prototxt")
    np.testing.assert_allclose(found, wanted(normalised=False), rtol=1e-5, atol=1e-5)


def test_opencv_is_given_no_split_of_labels_and_no_output_that_nothing_reads(tmp_path: Path) -> None:
    split = 'layer { name: "%s_split" type: "Split" bottom: "%s" top: "%s_0" top: "%s_1" top: "%s_2" }'
    aux = FC_TEXT.replace('"fc"', '"aux"') % "conv_1"
    losses = [
        LOSS.replace('"fc"', f'"{node}"').replace('"label"', f'"label_{i}"')
        for i, node in enumerate(("fc", "aux"))
    ]
    # `conv` is also overwritten in place behind its split: the head still reads what it was
    path = saved(
        tmp_path,
        DATA, split % (("label",) * 5), CONV_TEXT, split % (("conv",) * 5), aux,
        'layer { name: "r" type: "ReLU" bottom: "conv_2" top: "conv" }', FC_TEXT % "conv_0", *losses,
        aux=(FC, FC_BIAS),
    )  # fmt: skip
    np.testing.assert_allclose(logits(path), wanted(normalised=False), rtol=1e-5, atol=1e-5)
    assert agrees(path)


def test_python_layers_that_bring_data_or_measure_a_loss_are_stripped(tmp_path: Path) -> None:
    own = 'layer { name: "data" type: "Python" top: "data" top: "label" python_param { module: "m" layer: "L" } }'
    loss = LOSS.replace("SoftmaxWithLoss", "Python")
    path = saved(tmp_path, own, CONV_TEXT, FC_TEXT % "conv", loss)
    np.testing.assert_allclose(logits(path), wanted(normalised=False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ('layer { name: "p" type: "Python" bottom: "conv" bottom: "im_info" top: "rois" top: "scores" }',
         "layer p: unknown type Python"),
        ('layer { name: "p" type: "ROIPooling" bottom: "conv" bottom: "im_info" top: "rois" }',
         "layer p: unknown type ROIPooling"),
    ],
)  # fmt: skip
def test_a_foreign_layer_is_named_before_what_it_reads_and_writes(
    texts: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(KdError) as raised:
        converted(saved(tmp_path, DATA, CONV_TEXT, texts, FC_TEXT % "rois"))
    assert raised.value.message == words


OTHER = 'layer { name: "other" type: "Flatten" bottom: "data" top: "other" }'
MATCH = 'layer { name: "match" type: "EuclideanLoss" bottom: "other" bottom: "fc" top: "match" }'


def test_a_branch_that_only_a_loss_reads_is_left_out(tmp_path: Path) -> None:
    _, notes = converted(saved(tmp_path, DATA, CONV_TEXT, OTHER, FC_TEXT % "conv", MATCH, LOSS))
    assert notes == ["left out, as the logits (fc) do not need them: other"]


@pytest.mark.parametrize("kind", ["ConvolutionDepthwise", "DepthwiseConvolution"])
def test_the_depthwise_types_of_forks_are_convolutions_in_groups(kind: str, tmp_path: Path) -> None:
    factors, shifts = R.normal(0, 1, (4, 1, 1, 1)), R.normal(0, 1, 4)
    text = (
        CONV_TEXT.replace('"Convolution"', f'"{kind}"').replace('"conv"', '"dw"').replace('"data"', '"conv"')
    )
    path = saved(tmp_path, DATA, CONV_TEXT, text, FC_TEXT % "dw", LOSS, dw=(factors, shifts))
    bgr = IMAGES[..., ::-1].astype(float)
    maps = np.einsum("nyxc,oc->noyx", bgr, CONV[:, :, 0, 0]) + CONV_BIAS[:, None, None]
    maps = maps * factors[:, 0] + shifts[:, None, None]
    np.testing.assert_allclose(logits(path), maps.reshape(5, -1) @ FC.T + FC_BIAS, rtol=1e-5, atol=1e-5)
    assert agrees(path)


def test_a_layer_of_which_one_output_is_used_is_not_left_out(tmp_path: Path) -> None:
    cut = """layer { name: "cut" type: "Slice" bottom: "conv" top: "a" top: "b" slice_param { slice_point: 2 } }
      layer { name: "wide" type: "Concat" bottom: "a" bottom: "a" top: "wide" }"""
    _, notes = converted(saved(tmp_path, DATA, CONV_TEXT, cut, FC_TEXT % "wide", LOSS))
    assert notes == []


def test_image_size_option_gives_the_missing_size(tmp_path: Path) -> None:
    path = saved(tmp_path, DATA, CONV_TEXT, FC_TEXT % "conv", LOSS)
    config = ConvertConfig(preprocess="none", image_size=4)
    assert not caffe.read(path, config).needs_images(config)
    assert convert(path, config).input_size == (4, 4, 3)


def test_large_images_are_compared_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cv2")
    pool = """layer { name: "pool" type: "Pooling" bottom: "data" top: "pool"
      pooling_param { pool: AVE global_pooling: true } }"""
    path = saved(tmp_path, DATA, pool, FC_TEXT % "pool", LOSS, fc=(FC[:, :3], FC_BIAS))
    classifier = convert(path, ConvertConfig(preprocess="none", image_size=512))
    counts: list[int] = []
    run = opencv._forward
    monkeypatch.setattr(
        opencv, "_forward", lambda net, batch, name: counts.append(len(batch)) or run(net, batch, name)
    )
    compared = opencv.compare_logits(
        classifier, path, None, R.integers(0, 256, (5, 512, 512, 3), dtype=np.uint8)
    )
    assert compared.holds
    assert compared.images == 5
    assert counts == [2, 2, 1]
