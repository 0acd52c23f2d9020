"""The surface that TransformerLens notebooks speak, over the same forward: models, caches, small tools."""

from fastinterp.hooked import utils
from fastinterp.hooked.activation_cache import ActivationCache
from fastinterp.hooked.factored_matrix import FactoredMatrix
from fastinterp.hooked.hooks import HookPoint
from fastinterp.hooked.transformer import HookedTransformer

__all__ = ["ActivationCache", "FactoredMatrix", "HookPoint", "HookedTransformer", "utils"]
