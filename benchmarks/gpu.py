"""``python -m benchmarks.gpu``: every kernel against float64, then its time beside its floor and its target, as JSON.

In the shape of GPT-2 small with 10,000 tokens. ``--dry-run`` needs no GPU: tiny shapes through Triton's interpreter,
every precision, and no times. ``benchmarks/gpu.sh`` calls it.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.environment import environment

LARGEST_ERRORS = {"exact": 1e-4, "bf16x3": 2e-3, "tf32": 4e-2, "bf16": 0.3}
"""Of logits with a standard deviation of about 3, against float64."""

PRODUCTS = {"exact": 1, "bf16x3": 3, "tf32": 1, "bf16": 1}
"""Tensor-core products for each product of a precision."""

EXPONENTIALS_PER_CLOCK = 16
"""Of one multiprocessor: four special-function units of four lanes."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's shape and a number of tokens."""

    n_rows: int
    n_layers: int
    n_heads: int
    d_head: int
    d_model: int
    d_vocab: int
    k: int = 10

    @property
    def heads(self) -> int:
        return self.n_layers * self.n_heads


GPT2 = Shape(n_rows=10_000, n_layers=12, n_heads=12, d_head=64, d_model=768, d_vocab=50257)
TINY = Shape(n_rows=130, n_layers=2, n_heads=2, d_head=32, d_model=48, d_vocab=501, k=3)
CHECKED_ROWS = 16
"""Rows of a large shape that are compared: the float64 computation holds their logits for all heads."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Random inputs of which every head's contribution and every residual's logits have a standard deviation of 3."""

    x: Tensor
    z: list[Tensor]
    W_O: list[Tensor]
    W_U: Tensor
    targets: Tensor
    edited: Tensor
    """Of ``n_heads`` variants, what stands in place of all heads' ``z`` of the first layer side by side."""
    k: int

    @classmethod
    def random(cls, shape: Shape, device: torch.device) -> "Inputs":
        generator = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(sizes, generator=generator, device=device)

        return cls(
            x=normal(shape.n_rows, shape.d_model),
            z=[normal(shape.n_rows, shape.n_heads, shape.d_head) for _ in range(shape.n_layers)],
            W_O=[
                normal(shape.n_heads, shape.d_head, shape.d_model, scale=shape.d_head**-0.5)
                for _ in range(shape.n_layers)
            ],
            W_U=normal(shape.d_model, shape.d_vocab, scale=3.0 * shape.d_model**-0.5),
            targets=torch.randint(shape.d_vocab, (shape.n_rows, 1), generator=generator, device=device),
            edited=normal(shape.n_heads, shape.n_rows, shape.n_heads * shape.d_head),
            k=shape.k,
        )

    def rows(self, n: int) -> "Inputs":
        """The first rows, spread over the whole by a stride."""
        step = max(1, self.x.shape[0] // n)
        return Inputs(
            x=self.x[::step], z=[z[::step] for z in self.z], W_O=self.W_O, W_U=self.W_U,
            targets=self.targets[::step], edited=self.edited[:, ::step], k=self.k,
        )  # fmt: skip


Run = Callable[[Inputs, str, str], Sequence[Tensor]]
"""Inputs, backend and precision to results."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One operation. ``targets_ms``: what a device run is meant to stay below, by precision."""

    name: str
    run: Run
    flops: Callable[[Shape], float]
    exponentials: Callable[[Shape], float]
    n_bytes: Callable[[Shape], float]
    precisions: tuple[str, ...] = ("bf16", "bf16x3")
    targets_ms: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the device can do in a second, measured but for the exponentials, which are counted."""

    products: dict[str, float]
    exponentials: float
    bytes: float

    @classmethod
    def of(cls, device: torch.device) -> "Rates":
        def rate(dtype: torch.dtype) -> float:
            left, right = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
            return 2.0 * 8192**3 / _seconds(lambda: left @ right, device, repeats=5)

        exact = rate(torch.float32)
        torch.backends.cuda.matmul.allow_tf32 = True
        tf32 = rate(torch.float32)
        torch.backends.cuda.matmul.allow_tf32 = False
        bf16 = rate(torch.bfloat16)
        source = torch.empty(2**28, dtype=torch.float32, device=device)
        n_bytes = 2.0 * source.numel() * 4 / _seconds(source.clone, device, repeats=5)
        properties: Any = torch.cuda.get_device_properties(device)
        clock = 1000.0 * getattr(properties, "clock_rate", 1_755_000)
        return cls(
            products={"exact": exact, "tf32": tf32, "bf16": bf16, "bf16x3": bf16 / 3.0},
            exponentials=properties.multi_processor_count * EXPONENTIALS_PER_CLOCK * clock,
            bytes=n_bytes,
        )


def _jobs() -> tuple[Job, ...]:
    from fastinterp_kernels.attribution_reduce import attribution_reduce
    from fastinterp_kernels.delta_product import delta_product, rounded_product
    from fastinterp_kernels.direct_effect_loss import direct_effect_loss
    from fastinterp_kernels.head_logits import head_gather, head_logits
    from fastinterp_kernels.linear_cross_entropy import linear_cross_entropy
    from fastinterp_kernels.variant_residual import variant_residual

    def kwargs(backend: str, precision: str) -> dict[str, Any]:
        return {"backend": backend, "precision": precision if backend != "reference" else None}

    def logprob(i: Inputs, backend: str, precision: str) -> Sequence[Tensor]:
        found = head_logits(i.z, i.W_O, i.W_U, targets=i.targets, logsumexp=True, **kwargs(backend, precision))
        return _present(found.logsumexp, found.target_logit)

    def topk(i: Inputs, backend: str, precision: str) -> Sequence[Tensor]:
        found = head_logits(i.z, i.W_O, i.W_U, k=i.k, **kwargs(backend, precision))
        return _present(found.top_values, found.bottom_values)

    def loss(i: Inputs, backend: str, precision: str) -> Sequence[Tensor]:
        found = direct_effect_loss(i.x, i.z, i.W_O, i.W_U, i.targets, **kwargs(backend, precision))
        return found.logsumexp, found.target_logit

    def gather(i: Inputs, backend: str, precision: str) -> Sequence[Tensor]:
        dtype = torch.float64 if backend == "reference" else torch.float32
        z, W_O = ([t.to(dtype) for t in some] for some in (i.z, i.W_O))
        direction = (i.W_U[:, 1] - i.W_U[:, 2])[:, None]
        return (head_gather(z, W_O, direction.to(dtype), per_row=False),)

    def gather_per_row(i: Inputs, backend: str, precision: str) -> Sequence[Tensor]:
        dtype = torch.float64 if backend == "reference" else torch.float32
        z, W_O = ([t.to(dtype) for t in some] for some in (i.z, i.W_O))
        return (head_gather(z, W_O, i.W_U.T[i.targets[:, 0]].to(dtype), per_row=True),)

    def residual_loss(i: Inputs, backend: str, precision: str) -> Sequence[Tensor]:
        found = linear_cross_entropy(i.x, i.W_U, i.targets, **kwargs(backend, precision))
        return found.logsumexp, found.target_logit

    def variants(i: Inputs, backend: str, precision: str) -> Sequence[Tensor]:
        edits = torch.arange(i.z[0].shape[1], device=i.x.device)
        return (variant_residual(i.x, i.z[0], i.W_O[0], edits, **kwargs(backend, precision)),)

    def delta(i: Inputs, backend: str, precision: str) -> Sequence[Tensor]:
        options: dict[str, Any] = {"backend": backend, "precision": precision}
        return (delta_product(i.edited, i.z[0].flatten(1), i.W_O[0].flatten(0, 1), i.x, **options),)

    def rounded(i: Inputs, backend: str, precision: str) -> Sequence[Tensor]:
        backend = "auto" if backend == "triton" and i.x.is_cuda else backend  # in bf16 that is cuBLAS
        options: dict[str, Any] = {"backend": backend, "precision": precision}
        return (rounded_product(i.edited, i.W_O[0].flatten(0, 1), **options),)

    def attribution(i: Inputs, backend: str, precision: str) -> Sequence[Tensor]:
        return (attribution_reduce(i.z[0], i.z[-1], i.z[0], backend=backend),)  # type: ignore[arg-type]

    def pairs(s: Shape) -> float:
        return float(s.n_rows * s.heads * s.d_vocab)

    def none(s: Shape) -> float:
        return 0.0

    def weights(s: Shape) -> float:
        return 4.0 * s.d_model * (s.d_vocab + s.heads * s.d_head)

    def z_bytes(s: Shape) -> float:
        return 4.0 * s.n_rows * s.heads * s.d_head

    def edited_flops(s: Shape) -> float:
        return 2.0 * s.n_heads * s.n_rows * s.n_heads * s.d_head * s.d_model

    def edited_bytes(s: Shape) -> float:
        return 4.0 * s.n_heads * s.n_rows * (s.n_heads * s.d_head + s.d_model)

    def build(s: Shape) -> float:
        return 2.0 * s.heads * s.d_head * s.d_model * s.d_vocab

    return (
        Job(
            name="head_logprob", run=logprob, flops=lambda s: 2.0 * s.d_head * pairs(s) + build(s),
            exponentials=pairs, n_bytes=lambda s: z_bytes(s) + weights(s), targets_ms={"bf16": 33.0, "bf16x3": 60.0},
        ),
        Job(
            name="direct_effect_loss", run=loss,
            flops=lambda s: 2.0 * s.d_head * pairs(s) + 2.0 * s.n_rows * s.d_model * s.d_vocab + build(s),
            exponentials=pairs, n_bytes=lambda s: z_bytes(s) + weights(s), targets_ms={"bf16": 40.0, "bf16x3": 70.0},
        ),
        Job(
            name="head_topk", run=topk, flops=lambda s: 2.0 * s.d_head * pairs(s) + build(s), exponentials=none,
            n_bytes=lambda s: z_bytes(s) + weights(s) + 24.0 * s.n_rows * s.heads * s.k,
            targets_ms={"bf16": 60.0, "bf16x3": 60.0},
        ),
        Job(
            name="head_gather", run=gather, flops=lambda s: 2.0 * s.heads * s.d_head * (s.n_rows + s.d_model),
            exponentials=none, n_bytes=lambda s: z_bytes(s) + 4.0 * s.d_model * s.heads * s.d_head,
            precisions=("exact",), targets_ms={"exact": 2.0},
        ),
        Job(
            name="head_gather_per_row", run=gather_per_row,
            flops=lambda s: 2.0 * s.n_rows * s.heads * s.d_head * (s.d_model + 1), exponentials=none,
            n_bytes=lambda s: z_bytes(s) + 4.0 * s.d_model * s.heads * s.d_head, precisions=("exact",),
            targets_ms={},
        ),
        Job(
            name="linear_cross_entropy", run=residual_loss, flops=lambda s: 2.0 * s.n_rows * s.d_model * s.d_vocab,
            exponentials=lambda s: float(s.n_rows * s.d_vocab), n_bytes=weights, targets_ms={},
        ),
        Job(
            name="variant_residual", run=variants,
            flops=lambda s: 2.0 * s.n_rows * s.n_heads * s.d_head * s.d_model, exponentials=none,
            n_bytes=lambda s: 4.0 * s.n_rows * s.d_model * (s.n_heads + 1), targets_ms={},
        ),
        Job(
            name="delta_product", run=delta, flops=edited_flops, exponentials=none,
            n_bytes=lambda s: edited_bytes(s) * (1.0 + 1.0 / s.n_heads),
            precisions=("bf16", "tf32", "bf16x3"), targets_ms={},
        ),
        Job(
            name="rounded_product", run=rounded, flops=edited_flops, exponentials=none, n_bytes=edited_bytes,
            precisions=("bf16", "tf32", "bf16x3"), targets_ms={},
        ),
        Job(
            name="attribution_reduce", run=attribution, flops=none, exponentials=none,
            n_bytes=lambda s: 3.0 * z_bytes(s) / s.n_layers, precisions=("exact",), targets_ms={},
        ),
    )  # fmt: skip


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of ``run``, after two runs that compile and fill caches."""
    run(), run()
    return statistics.median(measure.measure(run, device)[1].wall_seconds for _ in range(repeats))


def largest_error(job: Job, inputs: Inputs, precision: str) -> float:
    """Largest difference of some rows from float64; infinite where one of the two is not a number."""
    some = inputs.rows(CHECKED_ROWS) if inputs.x.is_cuda else inputs
    exact = job.run(some, "reference", "exact")
    # All rows at once: what a block or a chunk does not reach would be seen.
    found = job.run(inputs, "triton", precision)
    step = max(1, inputs.x.shape[0] // some.x.shape[0])
    errors = []
    for value, wanted in zip(found, exact, strict=True):
        rows_first = value.shape[0] == inputs.x.shape[0]
        picked = value[::step] if rows_first else value[:, ::step]
        errors.append((picked.double() - wanted.double()).abs().nan_to_num(torch.inf).max())
    return float(torch.stack(errors).max())


def floor_ms(job: Job, shape: Shape, precision: str, rates: Rates) -> dict[str, float]:
    """The least time by each limit of the device, in milliseconds."""
    return {
        "products": 1e3 * job.flops(shape) / rates.products[precision],
        "exponentials": 1e3 * job.exponentials(shape) / rates.exponentials,
        "memory": 1e3 * job.n_bytes(shape) / rates.bytes,
    }


def check_and_time(
    job: Job, inputs: Inputs, shape: Shape, precision: str, rates: Rates | None, repeats: int = 5
) -> dict[str, Any]:
    """One row of the results: the error, and with ``rates`` the time, what bounds it and whether the target is met."""
    error = largest_error(job, inputs, precision)
    row: dict[str, Any] = {
        "operation": job.name, "precision": precision, "largest_error": error,
        "allowed_error": LARGEST_ERRORS[precision], "correct": error <= LARGEST_ERRORS[precision],
        "target_ms": job.targets_ms.get(precision),
    }  # fmt: skip
    if rates is None:
        return row
    device = inputs.x.device
    milliseconds = 1e3 * _seconds(lambda: job.run(inputs, "triton", precision), device, repeats)
    _, once = measure.measure(lambda: job.run(inputs, "triton", precision), device)
    floors = floor_ms(job, shape, precision, rates)
    target = row["target_ms"]
    return row | {
        "milliseconds": milliseconds, "floors_ms": floors, "fraction_of_floor": max(floors.values()) / milliseconds,
        "target_met": None if target is None else milliseconds <= target, "peak_bytes": once.peak_memory_bytes,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 only if every kernel is within its tolerance."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the results go")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: tiny shapes through the interpreter, no times")
    parser.add_argument("--only", metavar="NAMES", help="operations, with commas (default: all)")
    options = parser.parse_args(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, below
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device here. Type --dry-run.")
    shape, device = (TINY, torch.device("cpu")) if options.dry_run else (GPT2, torch.device("cuda"))
    torch.backends.cuda.matmul.allow_tf32 = False
    inputs, rates = Inputs.random(shape, device), None if options.dry_run else Rates.of(device)
    rows = []
    for job in _chosen(parser, options.only):
        for precision in tuple(LARGEST_ERRORS) if options.dry_run and len(job.precisions) > 1 else job.precisions:
            row = check_and_time(job, inputs, shape, precision, rates)
            rows.append(row)
            print(_line(row), flush=True)
            if options.json is not None:
                where = environment(device) | {"shape": asdict(shape)} | ({} if rates is None else asdict(rates))
                options.json.write_text(json.dumps({"environment": where, "results": rows}, indent=1) + "\n")
    return 0 if all(row["correct"] for row in rows) else 1


def _chosen(parser: argparse.ArgumentParser, names: str | None) -> list[Job]:
    jobs = {job.name: job for job in _jobs()}
    wanted = list(jobs) if names is None else names.split(",")
    if unknown := [name for name in wanted if name not in jobs]:
        parser.error(f"no operation {', '.join(unknown)}: choose from {', '.join(jobs)}")
    return [jobs[name] for name in wanted]


def _line(row: dict[str, Any]) -> str:
    text = (
        f"{row['operation']} {row['precision']}: {'ok' if row['correct'] else 'WRONG'}, largest error "
        f"{row['largest_error']:.1e} (allowed {row['allowed_error']:.0e})"
    )
    if "milliseconds" in row:
        text += f", {row['milliseconds']:.2f} ms, {100 * row['fraction_of_floor']:.0f} % of the floor"
    if row["target_ms"] is not None:
        met = {None: "a device run reports it", True: "met", False: "NOT met"}[row.get("target_met")]
        text += f", target {row['target_ms']:.0f} ms: {met}"
    return text


if __name__ == "__main__":
    sys.exit(main())
