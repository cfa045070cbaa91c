"""Checkpoint → one ONNX file whose outputs are verified against the checkpoint."""

from kdcli.deploy.export.exporter import ExportResult, default_output, export, export_classifier
from kdcli.deploy.export.job import AccuracyDrop
from kdcli.deploy.export.parity import Parity
