"""ONNX classifiers: reading, describing, running and writing them."""

from kdcli.deploy.onnx_model.classifier import OnnxClassifier
from kdcli.deploy.onnx_model.counts import PREPROCESSING, count_model
from kdcli.deploy.onnx_model.runner import LEVELS, OnnxRunner
