"""Caffe's files → a `Classifier`: prototxt + caffemodel, or caffe-tensorflow's `.npy`."""

from kdcli.caffe.convert import Conversion, Source, convert, read, to_classifier
from kdcli.caffe.network import LayerRow

__all__ = ["Conversion", "LayerRow", "Source", "convert", "read", "to_classifier"]
