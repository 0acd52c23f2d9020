"""The transformer. Start at ``forward.py``."""

from fastinterp.model.forward import final_logits, forward
from fastinterp.model.intervene import Capture, Edit, Taps
from fastinterp.model.model import Model, Origin
from fastinterp.model.spec import Attention, Mlp, ModelSpec, Norm, Position, Rope, RopeScaling
from fastinterp.model.weights import BlockWeights, NormWeights, Weights

__all__ = [
    "Attention",
    "BlockWeights",
    "Capture",
    "Edit",
    "Mlp",
    "Model",
    "ModelSpec",
    "Norm",
    "NormWeights",
    "Origin",
    "Position",
    "Rope",
    "RopeScaling",
    "Taps",
    "Weights",
    "final_logits",
    "forward",
]
