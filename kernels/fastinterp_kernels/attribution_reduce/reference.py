"""What ``attribution_reduce`` means: its input checks and the literal float64 computation."""

from jaxtyping import Float
from torch import Tensor

from fastinterp_kernels.common import check_float, check_same_device


def check_inputs(a: Tensor, b: Tensor | None, grad: Tensor) -> None:
    """Raise ``ValueError`` (shapes, devices) or ``TypeError`` (dtypes) for unusable inputs."""
    if a.ndim == 0 or grad.shape != a.shape:
        raise ValueError(
            f"a has shape {tuple(a.shape)} and grad {tuple(grad.shape)}; expected the same shape, with at least one "
            "axis, the last of which is summed over."
        )
    if b is not None:
        axes = zip(reversed(b.shape[:-1]), reversed(a.shape[:-1]))
        fits = 1 <= b.ndim <= a.ndim and b.shape[-1] == a.shape[-1] and all(n in (1, size) for n, size in axes)
        if not fits:
            raise ValueError(
                f"b has shape {tuple(b.shape)} and a {tuple(a.shape)}; expected the same last axis, and leading axes "
                "that are those of a, 1 or left out: for one b for all positions type b[:, None]."
            )
    check_float(a=a, b=b, grad=grad)
    check_same_device(a=a, b=b, grad=grad)


def attribution_reduce_reference(
    a: Float[Tensor, "*lead d"], b: Float[Tensor, "*#lead d"] | None, grad: Float[Tensor, "*lead d"]
) -> Float[Tensor, "*lead"]:
    """The definition in float64, with temporaries of the size of the inputs."""
    difference = a.double() if b is None else a.double() - b.double()
    return (difference * grad.double()).sum(-1)
