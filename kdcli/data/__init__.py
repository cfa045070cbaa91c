"""Datasets: every source becomes an `ImageSet` of uint8 images."""

from kdcli.data.images import ImageSet, Splits
from kdcli.data.load import load

__all__ = ["ImageSet", "Splits", "load"]
