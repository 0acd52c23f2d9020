"""What the tests of every kernel share: tolerance, allocations, the interpreter in a subprocess, compilation.

Import it as ``from tests.kernels.kernel_checks import ...``. A test module that runs its Triton checks under the
interpreter looks like::

    def triton_checks(device: str) -> dict[str, Callable[[], None]]: ...          # imports triton_kernel inside
    @pytest.fixture(scope="module")
    def interpreted(): return run_interpreted(__file__)
    @pytest.mark.parametrize("name", NAMES)
    def test_interpreted(name, interpreted): assert interpreted[name] is None, interpreted[name]
    if __name__ == "__main__": report_checks(triton_checks("cpu"))
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[2]


# Tolerance --------------------------------------------------------------------------------------------------


def largest_error(found: Tensor, exact: Tensor) -> float:
    """Largest difference; NaN and infinities have to be in the same places (else an error, or infinity)."""
    assert found.shape == exact.shape, (found.shape, exact.shape)
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    torch.testing.assert_close(found.isnan(), exact.isnan())
    same = (found == exact) | exact.isnan()
    difference = torch.where(same, 0.0, (found - exact).abs())
    return float(difference.max()) if difference.numel() else 0.0


def assert_within_rule(
    found: Tensor, exact: Tensor, plain: Tensor, *, factor: float = 3.0, floor: float = 1e-5
) -> None:
    """The error against float64 is at most 3 times that of the plain torch expression in this dtype, plus 1e-5."""
    allowed = factor * largest_error(plain, exact) + floor
    error = largest_error(found, exact)
    assert error <= allowed, f"error {error:.3g} beyond {allowed:.3g}"


# Memory -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nan_filled_allocations() -> Iterator[None]:
    """Every ``torch.empty`` is filled with NaN (integers: the largest)."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Allocations(NamedTuple):
    """Bytes of the largest single allocation, and the most that was held at once beyond what was held before."""

    largest: int
    peak: int


def allocations(run: Callable[[], object]) -> Allocations:
    """What ``run`` allocates on the CPU, temporaries inside of torch's operations included; its result counts."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = largest = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        largest, peak = max(largest, event.nbytes()), max(peak, held)
    del result
    return Allocations(largest, peak)


def cuda_peak_bytes(run: Callable[[], object]) -> int:
    """The most that ``run`` holds at once on the CUDA device, beyond what was held before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# Unembeddings -----------------------------------------------------------------------------------------------


def unembedding_layouts(W_U: Tensor) -> dict[str, Tensor]:
    """The same values ``[d_model, d_vocab]`` in every memory layout that an operation has to read."""
    d_model, d_vocab = W_U.shape
    wide = torch.full((d_model, d_vocab + 1000), math.nan, dtype=W_U.dtype, device=W_U.device)
    wide[:, 500 : 500 + d_vocab] = W_U
    return {
        "row_major": W_U.contiguous(),
        "transposed": W_U.T.contiguous().T,
        "columns_of_a_larger_matrix": wide[:, 500 : 500 + d_vocab],
        "every_other_column": W_U.repeat_interleave(2, dim=1)[:, ::2],
    }


# The interpreter --------------------------------------------------------------------------------------------

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Tests run side by side, and threads that wait for each other's share of a small product are slower than one."""


@contextlib.contextmanager
def fitted_tilings(module: Any, name: str = "default_tiling", **sizes: int) -> Iterator[None]:
    """Interpreted, tilings by the function ``name`` of ``module`` are no larger than ``sizes`` (by field) need.

    The interpreter computes what is masked too: most of a tile of 256 rows in a case of 40. Powers of two, at least 64.
    """
    from fastinterp_kernels.triton_common import INTERPRETED

    make = getattr(module, name)

    def fitted(*args: Any, **options: Any) -> Any:
        tiling = make(*args, **options)
        enough = {field: max(64, 1 << (size - 1).bit_length()) for field, size in sizes.items() if size}
        return dataclasses.replace(
            tiling, **{field: min(size, getattr(tiling, field)) for field, size in enough.items()}
        )

    with mock.patch.object(module, name, fitted) if INTERPRETED else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def columns_summed_alike() -> Iterator[None]:
    """Interpreted, equal columns of a product have equal bits wherever they stand, as they have on a GPU.

    The interpreter multiplies by NumPy, whose library may add up terms in an order that depends on the column.
    Summed in float64 and rounded, the order does not show.
    """
    from fastinterp_kernels.triton_common import INTERPRETED

    if not INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        wide = numpy.matmul(a.data.astype(numpy.float64), b.data.astype(numpy.float64))
        return TensorHandle(wide.astype(d.data.dtype) + d.data, d.dtype.scalar)

    with mock.patch.object(InterpreterBuilder, "create_dot", create_dot):
        yield


def run_interpreted(file: str, *arguments: str) -> dict[str, str | None]:
    """Run a test module as a script under ``TRITON_INTERPRET=1``; returns what :func:`report_checks` printed.

    In a process of its own, because Triton reads that variable once, when it decorates a kernel.
    """
    module = ".".join(Path(file).resolve().relative_to(ROOT).with_suffix("").parts)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", module, *arguments],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"} | ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return results


def report_checks(checks: Mapping[str, Callable[[], None]]) -> None:
    """Run every check under NaN-filled ``torch.empty``; print {name: traceback or None} as JSON."""
    failures: dict[str, str | None] = {}
    with nan_filled_allocations():
        for name, run in checks.items():
            try:
                run()
                failures[name] = None
            except Exception:
                failures[name] = traceback.format_exc()
    print(json.dumps(failures))


def run_python(code: str) -> str:
    """What a fresh interpreter prints for ``code``."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Compilation for GPUs that need not be there ----------------------------------------------------------------


SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # what one program may use
TENSOR_CORE = {80: "HMMA", 90: "HGMMA"}


class Compiled(NamedTuple):
    """A kernel compiled ahead of time. ``parameters`` are the names that stay arguments, in order."""

    capability: int
    ttir: str
    ptx: str
    sass: str
    registers: int
    local_bytes: int
    shared_bytes: int
    parameters: list[str]

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", self.sass))

    def __str__(self) -> str:
        return f"sm_{self.capability}: {self.registers} registers, {self.shared_bytes} bytes of shared memory"


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    capability: int,
    *,
    divisible: Iterable[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    max_registers: int | None = None,
) -> Compiled:
    """``kernel`` compiled for ``sm_{capability}`` as a launch with such arguments would compile it.

    ``signature``: type of every argument that is not a constant, ``"*fp32"``, ``"i32"``; arguments in neither
    mapping are ``i32``. ``constexprs``: constants, arguments that are None or specialised to 1 included.
    ``divisible``: integers known to be multiples of 16; pointers always are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    unknown = (set(signature) | set(constexprs) | set(divisible)) - set(names)
    assert not unknown, f"{sorted(unknown)} are no arguments of the kernel"
    types = dict.fromkeys(names, "i32") | dict(signature) | dict.fromkeys(constexprs, "constexpr")
    by_16 = [n for n in names if types[n].startswith("*") or n in set(divisible)]
    source = ASTSource(
        kernel,
        types,
        constexprs={(names.index(n),): value for n, value in constexprs.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in by_16},
    )
    options = {
        "num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, "maxnreg": max_registers,
    }  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, local_bytes = _resource_usage(compiled.asm["cubin"])
    return Compiled(
        capability, compiled.asm["ttir"], compiled.asm["ptx"], compiled.asm["sass"], registers, local_bytes,
        compiled.metadata.shared, [n for n in names if types[n] != "constexpr"],
    )  # fmt: skip


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of local memory and stack (spills)."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def loops(compiled: Compiled) -> list[str]:
    """The innermost loops of the machine code, each as its text: from a label to a branch back to it."""
    lines = compiled.sass.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(LBB\d+):", line))}
    backward = [
        (labels[match[1]], i)
        for i, line in enumerate(lines)
        if (match := re.search(r"\bBRA (LBB\d+)", line)) and labels.get(match[1], i) < i
    ]
    innermost = [(a, b) for a, b in backward if not any(a < c and d < b for c, d in backward)]
    return ["\n".join(lines[a : b + 1]) for a, b in innermost]


def assert_fits(compiled: Compiled) -> None:
    """Nothing is spilled to local memory, and a program fits the shared memory of a multiprocessor."""
    assert compiled.local_bytes == compiled.count("STL") == compiled.count("LDL") == 0, str(compiled)
    assert compiled.shared_bytes <= SHARED_BYTES[compiled.capability], str(compiled)


def assert_tensor_cores(compiled: Compiled, kind: str) -> None:
    """All products run on tensor cores with operands of ``kind``: ``bf16``, ``fp16`` or ``tf32``."""
    products = re.findall(rf"\b{TENSOR_CORE[compiled.capability]}\S*", compiled.sass)
    assert products, f"no {TENSOR_CORE[compiled.capability]}"
    pattern = {"tf32": "TF32", "fp16": r"F32(?!\.(BF|TF))", "bf16": r"F32\.BF16"}[kind]
    assert all(re.search(pattern, product) for product in products), products[0]


def assert_no_tensor_cores(compiled: Compiled) -> None:
    """All products run exactly, on the ordinary cores."""
    assert compiled.count(TENSOR_CORE[compiled.capability]) == 0
    assert compiled.count("FFMA") > 64


def assert_async_loads(compiled: Compiled) -> None:
    """A loop with products copies its operands ahead, asynchronously, 16 bytes at a time and only so.

    Other such loops, for ragged tiles, may copy less at a time.
    """
    product = TENSOR_CORE[compiled.capability] if compiled.count(TENSOR_CORE[compiled.capability]) else "FFMA"
    main = [loop for loop in loops(compiled) if re.search(rf"\b{product}\b", loop) and "LDGSTS" in loop]
    assert main, f"no loop has both {product} and LDGSTS"
    copies = [re.findall(r"\bLDGSTS\S*", loop) for loop in main]
    assert any(all(copy.endswith(".128") for copy in loop) for loop in copies), copies
