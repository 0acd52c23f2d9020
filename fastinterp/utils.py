"""The small tools of TransformerLens's ``utils`` under the path that notebooks import them from."""

from fastinterp.hooked.utils import (
    get_act_name,
    get_corner,
    get_device,
    lm_accuracy,
    lm_cross_entropy_loss,
    remove_batch_dim,
    test_prompt,
    to_numpy,
    transpose,
)

__all__ = [
    "get_act_name",
    "get_corner",
    "get_device",
    "lm_accuracy",
    "lm_cross_entropy_loss",
    "remove_batch_dim",
    "test_prompt",
    "to_numpy",
    "transpose",
]
