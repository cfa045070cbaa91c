"""Networks by name, and the `Classifier` that joins a network with its preprocessing."""

from kdcli.models.classifier import Classifier, final_linear, from_checkpoint, load, predict_logits
from kdcli.models.external import source_digests
from kdcli.models.layers import parameter_count
from kdcli.models.registry import MODELS, accepts, build, is_network, names, register
