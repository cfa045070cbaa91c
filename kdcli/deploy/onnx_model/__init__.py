"""Classifiers in ONNX files: what kd wrote into them, what can be told of anybody's, and running them.

A file that `kd export` wrote says in its metadata what it takes and gives, and how its pixels are prepared.
Of any other file only its input and output are known.
"""

from kdcli.deploy.onnx_model.classifier import OnnxClassifier
from kdcli.deploy.onnx_model.facts import PREPROCESSING, Facts, facts
from kdcli.deploy.onnx_model.files import LEVELS, read, serialized, session
from kdcli.deploy.onnx_model.remarks import FORMAT, decode_preprocess, encode_preprocess

__all__ = [
    "FORMAT",
    "LEVELS",
    "PREPROCESSING",
    "Facts",
    "OnnxClassifier",
    "decode_preprocess",
    "encode_preprocess",
    "facts",
    "read",
    "serialized",
    "session",
]
