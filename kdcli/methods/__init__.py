"""Methods of distillation: a registry, and the objective that a run minimises.

To add a method, write a function under `@method` in a module of this package, and its parity test.
"""

from typing import TYPE_CHECKING

from pydantic import create_model

from kdcli.base.config import TrainSettings
from kdcli.methods.batch import Batch, Features, Shapes, Training
from kdcli.methods.custom import check_typed, is_custom, source_digests
from kdcli.methods.objectives import Objective, Term, objective, parse, unread
from kdcli.methods.registry import CE, METHODS, Method, discover, method, option

discover(__name__)

if TYPE_CHECKING:
    TrainConfig = TrainSettings
else:  # the general settings of kd train and those of the methods
    TrainConfig = create_model(
        "TrainConfig",
        __base__=TrainSettings,
        __module__=__name__,
        __doc__=TrainSettings.__doc__,
        **{name: field for entry in METHODS.values() for name, field in entry.fields.items()},
    )
