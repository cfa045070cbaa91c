"""Datasets: every source becomes an `ImageSet` of uint8 images."""

from kdcli.data.images import (
    ImageSet,
    Splits,
    changed_test_images,
    incompatibility,
    other_classes,
    overlap_warning,
)
from kdcli.data.load import is_same_source, load, recorded_source, source_for
