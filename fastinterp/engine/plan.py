"""What a scan will compute and write: decided, checked and shown before anything is written."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

import fastinterp
from fastinterp.analyses import Analysis, compute_checked, prepared, tokenized
from fastinterp.engine.catalogue import CATALOGUE, choose_analyses
from fastinterp.errors import OptionError
from fastinterp.model.model import Model
from fastinterp.prompts import PromptSet, TokenizedPrompts
from fastinterp.store import ArraySpec, CoordSpec, StoreSpec, choose_block_size, status_array

BatchTokens = int | Literal["auto"]
OnBad = Literal["error", "reject"]

# A batch that takes this long tells the rate; a shorter one would time the first touch of the weights.
WARM_UP_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """One analysis of a scan: how many tokens a batch holds, and for how many prompts it runs (from the first on)."""

    analysis: Analysis
    batch_tokens: int
    n_prompts: int
    prompts: TokenizedPrompts

    def prepared(self, model: Model) -> "Task":
        """Returns the task with what its analysis has to know of all its prompts, such as means."""
        analysis, prompts = prepared(self.analysis, model, _first(self.prompts, self.n_prompts))
        return dataclasses.replace(self, analysis=analysis, prompts=prompts)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a scan will do. ``seconds`` is an estimate from a short warm-up, ``None`` if not asked for."""

    tasks: Mapping[str, Task]
    prompts: TokenizedPrompts
    prompt_set: PromptSet
    store: StoreSpec
    answer_texts: Mapping[str, tuple[str, ...]]
    flops: float
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON types: prompts kept and rejected, arrays, bytes, time."""
        return {
            "prompts": len(self.prompts),
            "kept": len(self.prompts.accepted),
            "rejected": [dataclasses.asdict(rejection) for rejection in self.prompts.rejected],
            "longest_prompt_tokens": self.prompts.max_len,
            "blocks": self.store.n_blocks,
            "block_prompts": self.store.block_size,
            "analyses": {
                name: {"prompts": task.n_prompts, "batch_tokens": task.batch_tokens}
                for name, task in self.tasks.items()
            },
            "arrays": [
                {
                    "name": array.name,
                    "dims": list(array.dims),
                    "shape": list(array.shape),
                    "dtype": array.dtype,
                    "bytes": math.prod(array.shape) * array.itemsize,
                }
                for array in self.store.arrays
            ],
            "bytes": self.store.nbytes(),
            "flops": self.flops,
            "estimated_seconds": self.seconds,
        }


def plan(
    model: Model,
    prompts: PromptSet | str | Path,
    *,
    analysis: str | Sequence[str] = "dla",
    metric: str = "logit_diff",
    limit: int | None = None,
    ablation_limit: int | None = None,
    batch_tokens: BatchTokens = "auto",
    answer_token: Literal["single", "first"] = "single",
    prepend_bos: bool | None = None,
    bad_prompts: OnBad = "error",
    compress: Literal["none", "zstd"] = "none",
    estimate: bool = False,
) -> Plan:
    """Decides what a scan of ``prompts`` will compute and write; see :func:`scan` for the arguments.

    Raises:
        PromptError: prompts that cannot be used (all of them are listed), unless ``bad_prompts="reject"``.
        OptionError, MetricError: options that there are not, or that do not fit the prompts.

    Example:
        >>> fastinterp.plan(model, "prompts.jsonl", analysis="dla,ablation").to_dict()["bytes"]    # doctest: +SKIP
    """
    check_counts(limit=limit, ablation_limit=ablation_limit, batch_tokens=batch_tokens)
    analyses = choose_analyses(analysis, metric)
    prompt_set = prompts if isinstance(prompts, PromptSet) else PromptSet.read(prompts)
    if limit is not None:
        prompt_set = prompt_set.head(min(limit, len(prompt_set)))
    needed = {column for chosen in analyses.values() for column in chosen.metric.needs}
    tokens = prompt_set.tokenize(
        model,
        prepend_bos=prepend_bos,
        answer_token=answer_token,
        bad_prompts=bad_prompts,
        require=tuple(column for column in ("answer", "wrong") if column in needed),
    )
    for chosen in analyses.values():
        tokens = tokenized(model, tokens, chosen.metric)

    tasks, flops = {}, 0.0
    for name, chosen in analyses.items():
        n_prompts = len(tokens)
        if CATALOGUE[name].sweep and ablation_limit is not None:
            n_prompts = min(n_prompts, ablation_limit)
        auto = chosen.tokens_per_batch(model) if batch_tokens == "auto" else batch_tokens
        tasks[name] = Task(analysis=chosen, batch_tokens=auto, n_prompts=n_prompts, prompts=tokens)
        flops += chosen.cost(model.spec, int(tokens.n_tokens[:n_prompts].sum()))
    options = {
        "metric": metric,
        "answer_token": answer_token,
        "prepend_bos": tokens.prepend_bos,
        "bad_prompts": bad_prompts,
        "analyses": {name: {"prompts": task.n_prompts} for name, task in tasks.items()},
    }
    store = _store_spec(model, tokens, prompt_set, tasks, options, compress)
    result = Plan(
        tasks=tasks,
        prompts=tokens,
        prompt_set=prompt_set,
        store=store,
        answer_texts=_answer_texts(model, tokens),
        flops=flops,
    )
    return dataclasses.replace(result, seconds=_estimate(model, result)) if estimate else result


def _first(prompts: TokenizedPrompts, n: int) -> TokenizedPrompts:
    """Returns the prompts with all but the first ``n`` left out, under the same indices."""
    if n >= len(prompts):
        return prompts
    n_tokens = prompts.n_tokens.copy()
    n_tokens[n:] = 0
    return dataclasses.replace(prompts, n_tokens=n_tokens)


def check_counts(*, limit: int | None, ablation_limit: int | None, batch_tokens: BatchTokens) -> None:
    """Raises :class:`OptionError` for counts that are not positive."""
    for name, value in {
        "limit": limit,
        "ablation_limit": ablation_limit,
        "batch_tokens": batch_tokens,
    }.items():
        if value is None or value == "auto":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            wanted = "a positive integer or 'auto'" if name == "batch_tokens" else "a positive integer"
            raise OptionError(f"{name}={value!r}: give {wanted}")


def _store_spec(
    model: Model,
    tokens: TokenizedPrompts,
    prompt_set: PromptSet,
    tasks: Mapping[str, Task],
    options: Mapping[str, Any],
    compress: Literal["none", "zstd"],
) -> StoreSpec:
    """Lays out the arrays: the fields of every analysis, and what identifies the prompts."""
    n_prompts, n_pos = len(tokens), tokens.max_len
    arrays: list[ArraySpec] = []
    coords: dict[str, CoordSpec] = {
        "pos": CoordSpec(name="pos", dims=("pos",), values=list(range(n_pos))),
    }
    for task in tasks.values():
        for field in task.analysis.fields(model.spec, n_pos):
            if any(array.name == field.name for array in arrays):
                # Analyses of one metric share its clean values.
                continue
            shape = (n_prompts, *field.shape)
            attrs = dict(field.attrs) | {"n_prompts_computed": task.n_prompts}
            dims = ("prompt", *field.dims)
            arrays.append(
                ArraySpec(name=field.name, dims=dims, shape=shape, dtype=field.dtype, attrs=attrs, kind="result")
            )
            for name, (coord_dims, values) in field.coords.items():
                coords[name] = CoordSpec(name=name, dims=coord_dims, values=values)
    widest = max(4 * math.prod(array.shape[1:]) for array in arrays)
    sweep = any(CATALOGUE[name].sweep for name in tasks)

    def prompt_array(name: str, dtype: Literal["int32", "str"], long_name: str, dims: tuple[str, ...] = ()) -> None:
        shape = (n_prompts, n_pos) if dims else (n_prompts,)
        attrs = {"long_name": long_name}
        arrays.append(
            ArraySpec(name=name, dims=("prompt", *dims), shape=shape, dtype=dtype, attrs=attrs, kind="prompt")
        )

    prompt_array("tokens", "int32", "token ids, -1 after the last", ("pos",))
    prompt_array("n_tokens", "int32", "number of tokens, 0 if rejected")
    prompt_array("prompt_text", "str", "text of the prompt")
    prompt_array("prompt_id", "str", "id of the prompt")
    for name, ids in (("answer", tokens.answer), ("wrong", tokens.wrong)):
        if ids is not None:
            prompt_array(name, "str", f"{name} token; several are separated by |")
    arrays.append(status_array(n_prompts))
    identity = {
        "model": model.origin.source,
        "model_revision": model.origin.revision,
        "weights_sha256": model.weights_sha256,
        "tokenizer_hash": model.tokenizer_hash,
        "processing": model.origin.processing,
        "dtype": str(model.dtype).removeprefix("torch."),
        "input_hash": prompt_set.content_hash(),
        "options": dict(options),
    }
    attrs = identity | {
        "model_spec": model.spec.to_dict(),
        "device": str(model.device),
        "batch_tokens": {name: task.batch_tokens for name, task in tasks.items()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "fastinterp_version": fastinterp.__version__,
        "torch_version": torch.__version__,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    return StoreSpec(
        n_prompts=n_prompts,
        block_size=choose_block_size(n_prompts, widest, sweep=sweep),
        arrays=arrays,
        coords=tuple(coords.values()),
        attrs=attrs,
        identity=identity,
        compress=compress,
    )


def _answer_texts(model: Model, tokens: TokenizedPrompts) -> dict[str, tuple[str, ...]]:
    """Returns the answers as text, for the store."""
    given = {"answer": tokens.answer, "wrong": tokens.wrong}
    return {
        name: tuple(" | ".join(model.token_strings([int(t) for t in row if t >= 0])) for row in ids)
        for name, ids in given.items()
        if ids is not None
    }


def _estimate(model: Model, planned: Plan) -> float:
    """Times one batch of each analysis, and scales by the operations that all of its prompts need."""
    total = 0.0
    for task in planned.tasks.values():
        accepted = planned.prompts.accepted
        accepted = accepted[accepted < task.n_prompts]
        if len(accepted) == 0:
            continue
        # Prompts of middle length; twice as many each time, until the time says something about the rate.
        order = accepted[planned.prompts.n_tokens[accepted].argsort()]
        size, seconds = 1, 0.0
        analysis = _rehearsed(model, task)
        # What is resampled from does not matter for the time either.
        prompts = dataclasses.replace(task.prompts, corrupt=task.prompts.corrupt or task.prompts.tokens)
        while True:
            start = (len(order) - size) // 2
            batch = prompts.batches(task.batch_tokens, order[start : start + size])[0]
            began = time.perf_counter()
            compute_checked(analysis, model, batch)
            seconds = time.perf_counter() - began
            if seconds > WARM_UP_SECONDS or len(batch) < size or 2 * size > len(order):
                break
            size *= 2
        whole = task.analysis.cost(model.spec, int(planned.prompts.n_tokens[accepted].sum()))
        total += seconds * whole / task.analysis.cost(model.spec, int(batch.n_tokens.sum()))
    return total


def _rehearsed(model: Model, task: Task) -> Analysis:
    """The analysis prepared on few prompts: what is timed does not depend on their values."""
    some = _first(task.prompts, int(task.prompts.accepted[0]) + 1)
    return prepared(task.analysis, model, dataclasses.replace(some, corrupt=some.corrupt or some.tokens))[0]
