"""Float32 ONNX → static int8 (QDQ), by a given recipe or by the best of several."""

from kdcli.deploy.int8.quantiser import Quantiser, needs_reduced_range
from kdcli.deploy.int8.recipe import Quantisation, Recipe
from kdcli.deploy.int8.recipe_search import RecipeTrial, search

__all__ = ["Quantisation", "Quantiser", "Recipe", "RecipeTrial", "needs_reduced_range", "search"]
