"""Ablation written out: one prompt, one unit and one run at a time, means and partners' values from caches by hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastinterp.model import Taps, final_logits, forward
from fastinterp.model.norms import center, norm_scale

METRICS = ("logit_diff", "logit", "logprob", "prob", "rank", "top1", "kl", "loss")
HOOKS = {"z": "attn.hook_z", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out", "post": "mlp.hook_post"}

# A part is (site, layer, index): the head of z, the neuron of post, None for all of attn_out and mlp_out.


def units_of(spec, kind):
    """The units of a kind in order, each a list of parts."""
    layers = range(spec.n_layers)
    return {
        "heads": [[("z", layer, head)] for layer in layers for head in range(spec.n_heads)],
        "attns": [[("attn_out", layer, None)] for layer in layers],
        "mlps": [[("mlp_out", layer, None)] for layer in layers],
        "layers": [[("attn_out", layer, None), ("mlp_out", layer, None)] for layer in layers],
        "neurons": [[("post", layer, n)] for layer in layers for n in range(spec.mlp.d_mlp)],
    }[kind]


def part_of(values, part):
    """The part of a whole activation ``[..., head, d_head]``, ``[..., d_mlp]`` or ``[..., d_model]``."""
    site, _, index = part
    return values[..., index, :] if site == "z" else values[..., index] if site == "post" else values


@dataclass
class Put:
    """Puts values ``[pos, ..]`` in place of a part at some positions."""

    part: tuple
    positions: Sequence[int]
    values: torch.Tensor
    changes: bool = True

    def apply(self, value):
        value = value.clone()
        site, _, index = self.part
        for p in self.positions:
            if site == "z" or site == "post":
                value[0, p, index] = self.values[p]
            else:
                value[0, p] = self.values[p]
        return value


class Hooked:
    """A TransformerLens bridge: logits ``[pos, d_vocab]`` of one prompt, unpadded, and its cache."""

    def __init__(self, bridge):
        self.bridge = bridge

    def cache(self, prompt, sites):
        names = {f"blocks.{layer}.{HOOKS[site]}": (site, layer) for site, layer in sites}
        with torch.no_grad():
            _, cache = self.bridge.run_with_cache(torch.tensor([prompt]), names_filter=list(names))
        return {key: cache[name][0].clone() for name, key in names.items()}

    def logits(self, prompt, puts=()):
        hooks = [
            (f"blocks.{put.part[1]}.{HOOKS[put.part[0]]}", lambda value, hook, put=put: put.apply(value))
            for put in puts
        ]
        with torch.no_grad():
            return self.bridge.run_with_hooks(torch.tensor([prompt]), fwd_hooks=hooks)[0].double()


class Tapped:
    """The forward of a model with taps of this file's own."""

    def __init__(self, model):
        self.model = model

    def run(self, prompt, puts=(), capture=()):
        model, edits = self.model, {}
        for put in puts:
            edits.setdefault(put.part[:2], []).append(put)
        taps = Taps(wanted=frozenset(capture), edits=edits)
        with torch.no_grad():
            resid = forward(model.spec, model.weights, torch.tensor([prompt]), taps=taps)
        return resid, taps.values

    def cache(self, prompt, sites):
        return {key: value[0] for key, value in self.run(prompt, capture=sites)[1].items()}

    def logits(self, prompt, puts=()):
        with torch.no_grad():
            return final_logits(self.model.spec, self.model.weights, self.run(prompt, puts)[0])[0].double()

    def without(self, prompt, puts):
        """Logits with parts replaced in what they add to the logits alone, every scale that of the clean run."""
        spec, weights = self.model.spec, self.model.weights
        sites = {put.part[:2] for put in puts}
        norms = {(f"ln{n}_post_scale", layer) for n in (1, 2) for _, layer in sites} if spec.post_norms else set()
        resid, values = self.run(prompt, capture=sites | norms)
        scale = norm_scale(spec.norm, resid)[0]

        def final(x):
            x = x if weights.ln_final.w is None else x * weights.ln_final.w
            return x

        x = final(center(spec.norm, resid)[0] / scale)
        if weights.ln_final.b is not None:
            x = x + weights.ln_final.b
        raw = x @ weights.W_U + (0 if weights.b_U is None else weights.b_U)
        for put in puts:
            site, layer, index = put.part
            w = weights.blocks[layer]
            change = put.values - part_of(values[site, layer][0], put.part)
            if site == "z":
                change, post, name = change @ w.W_O[index], w.ln1_post, "ln1_post_scale"
            elif site == "post":
                change, post, name = change[:, None] * w.W_out[index], w.ln2_post, "ln2_post_scale"
            else:
                post = None
            if post is not None:
                change = center(spec.norm, change) / values[name, layer][0] * (1 if post.w is None else post.w)
            added = final(center(spec.norm, change) / scale) @ weights.W_U
            for p in put.positions:
                raw[p] += added[p]
        cap = spec.final_softcap
        return (raw if cap is None else cap * torch.tanh(raw / cap)).double()


def measured(logits, clean, prompt, answer, wrong, margin):
    """Every metric of logits ``[pos, d_vocab]``; of ``rank`` and ``top1`` the bounds if logits move by ``margin``."""
    last, before = logits[-1], clean[-1].log_softmax(-1)
    following = torch.tensor(prompt[1:], dtype=torch.int64)
    best = float(last[answer].max())
    ranks = sorted(int((last > best + step).sum()) for step in (margin, -margin))
    # The other answers are above the best by less than the margin only if they are it.
    ranks[1] -= sum(float(last[a]) > best - margin for a in answer)
    ranks[1] = max(ranks)
    found = {
        "logit_diff": last[answer].mean() - last[wrong].mean(),
        "logit": last[answer].mean(),
        "logprob": last.softmax(-1)[answer].sum().log(),
        "prob": last.softmax(-1)[answer].sum(),
        "kl": (before.exp() * (before - last.log_softmax(-1))).sum(),
    }
    result = {name: (float(value), float(value)) for name, value in found.items()}
    result["rank"] = (float(ranks[0]), float(ranks[1]))
    result["top1"] = (float(ranks[1] == 0), float(ranks[0] == 0))
    loss = -logits.log_softmax(-1)[torch.arange(len(following)), following].numpy()
    result["loss"] = (loss, loss)
    return result


class Loop:
    """The loops that ``ablate`` stands for, over prompts given as ids."""

    def __init__(self, run, spec, prompts, answer, wrong, *, corrupt=None, reference=None, sites=None):
        self.run, self.spec, self.prompts, self.answer, self.wrong = run, spec, prompts, answer, wrong
        sites = sites or {(site, layer) for site in HOOKS for layer in range(spec.n_layers)}

        def cached(all_ids):
            return [run.cache(ids, sites) for ids in all_ids]

        self.own = cached(prompts)
        self.other = None if corrupt is None else cached(corrupt)
        self.reference = self.own if reference is None else cached(reference)
        self.clean = [run.logits(prompt) for prompt in prompts]
        self.means, self.before = {}, {}

    def values(self, mode, row, part, mean_over):
        """What stands in place of a part at every position of a prompt."""
        key = part[:2]
        own = part_of(self.own[row][key], part)
        if mode == "zero":
            return torch.zeros_like(own)
        if mode == "resample":
            return part_of(self.other[row][key], part)
        if (key, mean_over) not in self.means:
            self.means[key, mean_over] = self.mean(key, mean_over)
        mean = part_of(self.means[key, mean_over], part)
        return mean[: len(own)] if mean_over == "pos" else mean.expand_as(own)

    def mean(self, key, over):
        known = [cache[key] for cache in self.reference]
        if over == "tokens":
            return torch.cat(known).mean(0)
        longest = max(map(len, known))
        return torch.stack([torch.stack([one[p] for one in known if len(one) > p]).mean(0) for p in range(longest)])

    def effect(self, row, unit, mode, positions, effect="total", mean_over="tokens", margin=0.0):
        """For every metric the lowest and the highest value that the effect can have."""
        puts = [Put(part, positions, self.values(mode, row, part, mean_over)) for part in unit]
        prompt = self.prompts[row]
        logits = self.run.logits(prompt, puts) if effect == "total" else self.run.without(prompt, puts)
        columns = (self.answer[row], self.wrong[row], margin)
        after = measured(logits, self.clean[row], prompt, *columns)
        if (row, margin) not in self.before:
            self.before[row, margin] = measured(self.clean[row], self.clean[row], prompt, *columns)
        before = self.before[row, margin]
        return {name: (after[name][0] - before[name][1], after[name][1] - before[name][0]) for name in METRICS}


def position_sets(pos, prompts):
    """For each prompt the sets of positions that are ablated together: one, or with ``"each"`` one per position."""
    found = []
    for row, prompt in enumerate(prompts):
        n = len(prompt)
        if pos == "each":
            found.append([[p] for p in range(n)])
        elif pos == "all":
            found.append([list(range(n))])
        elif isinstance(pos, slice):
            found.append([list(range(n))[pos]])
        else:
            found.append([[range(n)[pos if isinstance(pos, int) else pos[row]]]])
    return found


def assert_equal(
    data, loop: Loop, units, *, modes, pos, effects: Sequence[str], tolerance: float, mean_over="tokens",
    metrics: Sequence[str] = METRICS, pick: Callable = lambda units: units,
):  # fmt: skip
    """Compares ``ablate``'s dataset with the loop, number by number; returns the largest effect by metric."""
    largest = dict.fromkeys(metrics, 0.0)
    chosen = pick(list(enumerate(units)))
    for mode in modes:
        for effect in effects:
            arrays = {}
            for name in metrics:
                array = data[f"{name}_{mode}_{effect}"]
                n_units = 1 + (name == "loss") + (pos == "each")
                arrays[name] = array.values.reshape(*array.shape[:n_units], -1)
                assert arrays[name].shape[-1] == len(units)
            for row, sets in enumerate(position_sets(pos, loop.prompts)):
                n = len(loop.prompts[row])
                for index, unit in chosen:
                    for step, positions in enumerate(sets):
                        wanted = loop.effect(row, unit, mode, positions, effect, mean_over, margin=tolerance)
                        for name in metrics:
                            got = arrays[name][row][..., index]
                            got = got[..., step] if pos == "each" else got
                            if name == "loss":
                                assert np.isnan(got[n - 1 :]).all()
                                got = got[: n - 1]
                            low, high = wanted[name]
                            where = (mode, effect, name, unit, row, positions)
                            assert np.all(got >= low - tolerance), (where, got, low, high)
                            assert np.all(got <= high + tolerance), (where, got, low, high)
                            largest[name] = max(largest[name], float(np.abs(got).max(initial=0.0)))
    if pos == "each":
        for name in metrics:
            for row, prompt in enumerate(loop.prompts):
                beyond = data[f"{name}_{modes[0]}_{effects[0]}"].isel(prompt=row)
                assert np.isnan(beyond.isel(edit_pos=slice(len(prompt), None)).values).all()
    return largest
