"""What an ablation needs: bytes, by which its batches are planned, and tokens of a batch without a limit."""

from collections.abc import Collection, Sequence

from fastinterp.analyses import budget
from fastinterp.analyses.edited_positions import EditPos
from fastinterp.analyses.replacements import MeanOver, Mode
from fastinterp.analyses.units import ChosenUnits
from fastinterp.metrics import Metric
from fastinterp.model.model import Model
from fastinterp.sweep import Precision
from fastinterp.sweep.costs import Demand

# Tokens of a batch (on a GPU, on a CPU): with few variants, more make a product no faster. Equal beginnings count once.
_TOKENS = (1 << 18, 1 << 11)
# How many times as many tokens those may be, on a CPU: keys and values are spread to all of them.
_MOST_SHARED = 4
# Tokens of a batch of which only the ends are computed (on a GPU, on a CPU), and of a prompt that is short among those.
_END_TOKENS = (1 << 15, 1 << 10)
_SHORT_PROMPT = 16


def ablation_costs(
    model: Model,
    chosen: ChosenUnits,
    *,
    modes: tuple[Mode, ...],
    metrics: Sequence[Metric],
    effects: Collection[str],
    pos: EditPos,
    mean_over: MeanOver,
    precision: Precision,
    n_targets: int,
    mean_pos: int,
    mean_prompts: int = 1,
) -> budget.Costs:
    """Returns the costs of the sweep, of the direct effects and of the means, of those that there are.

    ``n_targets``: answers and wrong answers of a prompt. The means are over ``mean_prompts`` prompts, of which the
    longest has ``mean_pos`` tokens.
    """
    each = pos == "each"
    demand = None
    if "total" in effects:
        demand = Demand(
            n_units=len(chosen.units) * len(modes),
            sites=frozenset(chosen.sites),
            measured=budget.measured_by(metrics, n_targets),
            pos_axes=int(each),
            width=-pos if isinstance(pos, int) and pos < 0 else None,
            partial=pos != "all",
            several=any(len(unit) > 1 for unit in chosen.units),
            source="resample" in modes,
            precision=precision,
        )
    direct = None
    if "direct" in effects:
        heads = chosen.single_heads is not None
        direct = budget.direct_cost(
            model, chosen.sites, len(chosen.units), modes, metrics, heads=heads, n_targets=n_targets, each=each
        )
    mean = budget.MeanCost(
        widths=budget.widths_of(model),
        sites=chosen.sites,
        n_pos=mean_pos,
        n_prompts=mean_prompts,
        by_pos=mean_over == "pos",
    )
    return budget.Costs(model=model, demand=demand, direct=direct, mean=mean if "mean" in modes else None)


def usual_tokens(model: Model, n_variants: int, pos: EditPos, *, swept: bool, distinct: float = 1.0) -> int:
    """As many tokens as keep all variants' residuals within 256 MiB, but enough for a matrix product and no more.

    ``distinct``: the share of tokens that have to be computed, see ``TokenizedPrompts.distinct_share``.
    """
    cpu = model.device.type == "cpu"
    if not swept:
        return 1 << 12 if cpu else 1 << 14
    each = n_variants * model.spec.d_model * model.weights.W_E.element_size()
    most_bytes = (1 << 28) if cpu else (1 << 33)
    if isinstance(pos, int) and pos < 0:
        # Only the ends of prompts are computed, which are seldom shorter than this.
        return max(256, min(_END_TOKENS[cpu], most_bytes // each * _SHORT_PROMPT // -pos))
    shared = min(_MOST_SHARED, 1 / distinct) if cpu else 1
    return max(256, min(int(_TOKENS[cpu] * shared), most_bytes // each))
