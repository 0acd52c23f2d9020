"""On which machine, with which versions and from which commit a number was measured."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = ("fastinterp", "torch", "triton", "transformers", "transformer-lens", "numpy")


def device_name(device: torch.device) -> str:
    """Returns the short name that results are filed under, such as ``cpu-2cores`` or ``h100``."""
    if device.type == "cuda":
        return gpu_name(torch.cuda.get_device_name(device))
    return f"cpu-{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}cores"


def gpu_name(product: str) -> str:
    """Returns the model in a product name: ``NVIDIA H100 80GB HBM3`` gives ``h100``."""
    words = re.sub(r"nvidia|amd|geforce|tesla", "", product.lower()).strip()
    model = re.search(r"\b[a-z]{1,2}\d{2,4}[a-z]?\b", words)
    return model.group() if model else re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def commit() -> str:
    """Returns the git commit, with ``-dirty`` after it where files have changed since, or ``unknown``."""
    head = _git("rev-parse", "HEAD")
    if not head:
        return "unknown"
    # The results themselves do not make a measurement dirty.
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    return f"{head[:12]}-dirty" if changed else head[:12]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def versions() -> dict[str, str]:
    """Returns the version of every package that matters for a timing and is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # From a source tree, or on a machine without it.
            continue
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Returns what is written beside every row."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()
    return {
        "device": device_name(device),
        "processor": processor,
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "versions": versions(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
