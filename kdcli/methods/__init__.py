"""Methods of distillation: a registry, and the objective that a run minimises.

To add a method, write a function under `@method` in a module of this package, and its parity test.
"""

from kdcli.methods.batch import Batch, Features, Shapes, Training
from kdcli.methods.custom import check_typed, is_custom, source_digests
from kdcli.methods.objectives import Objective, Term, objective, parse, unread
from kdcli.methods.registry import CE, METHODS, Method, method, option
from kdcli.methods.settings import TrainConfig
