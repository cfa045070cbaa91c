"""Caffe's files → a `Classifier`: prototxt and caffemodel, or caffe-tensorflow's `.npy`."""

from kdcli.caffe.convert import CaffeFiles, read, to_classifier
