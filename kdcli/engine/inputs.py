"""The images that a run's settings name."""

from kdcli import data, models
from kdcli.base.errors import UsageError
from kdcli.base.events import OnEvent, ignore
from kdcli.data import Splits
from kdcli.methods import TrainConfig


def load_data(config: TrainConfig, on_event: OnEvent = ignore) -> Splits:
    """Training and test images; where the student is a file, in its input size.

    Raises:
        KdError: the data cannot be read.
        UsageError: the student's file does not exist.
    """
    stored = config.student_file
    if stored is not None and not stored.is_file():
        raise UsageError(f"no such student: {stored}", "--student takes a network's name or a .pt file.")
    return data.load(
        config.data,
        data_dir=config.data_dir,
        cache_dir=config.cache_dir,
        image_size=config.image_size,
        grey=config.grey,
        fit_to=None if stored is None else models.load(stored).input_size,
        skip_broken=config.skip_broken,
        unlabelled=config.unlabelled,
        on_event=on_event,
    )
