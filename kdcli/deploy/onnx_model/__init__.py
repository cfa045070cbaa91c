"""ONNX classifiers: reading, describing, running and writing them.

The metadata of a file that `kd export` wrote gives class names, preprocessing and origin. Of any other file only
input and output are known.
"""

from kdcli.deploy.onnx_model.classifier import OnnxClassifier
from kdcli.deploy.onnx_model.counts import PREPROCESSING, ModelCounts, count_model
from kdcli.deploy.onnx_model.metadata import decode_preprocess, encode_preprocess
from kdcli.deploy.onnx_model.reader import read, serialize
from kdcli.deploy.onnx_model.runner import LEVELS, OnnxRunner

__all__ = [
    "LEVELS",
    "PREPROCESSING",
    "ModelCounts",
    "OnnxClassifier",
    "OnnxRunner",
    "count_model",
    "decode_preprocess",
    "encode_preprocess",
    "read",
    "serialize",
]
