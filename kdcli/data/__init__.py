"""Datasets: every source becomes an `ImageSet` of uint8 images."""

from kdcli.data.images import ImageSet, Splits, misfit
from kdcli.data.load import load, spec_for

__all__ = ["ImageSet", "Splits", "load", "misfit", "spec_for"]
