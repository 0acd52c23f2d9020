"""Activation patching against TransformerLens's own tools, and against one forward with one edit for each patch."""

import itertools

import numpy as np
import pytest
import torch
import transformer_lens.patching as tl

from fastinterp.analyses import activation_patch
from fastinterp.errors import MetricError, OptionError, PromptPairError
from fastinterp.model import Edit, Taps, final_logits, forward
from fastinterp.prompts import PromptSet

TOLERANCE = 1e-4
EXACT = 1e-9
FAMILIES = [
    "gpt2", "llama-gqa", "mistral-window", "gemma2-softcaps", "gemma3-mixed-rope", "gpt-neo", "gpt-neox", "opt",
    "qwen3-biases-mha-wide-head-windows-tied", "llama-one-head-one-layer",
]  # fmt: skip


@pytest.fixture
def pairs(token_prompts, answers):
    rows = [row for row, prompt in enumerate(token_prompts) if 1 < len(prompt) < 8][:3]
    prompts = [token_prompts[row] for row in rows]
    generator = torch.Generator().manual_seed(3)
    corrupt = [torch.randint(1, 379, (len(prompt),), generator=generator).tolist() for prompt in prompts]
    columns = {name: [column[row] for row in rows] for name, column in answers.items()}
    return PromptSet.of(prompts, corrupt=corrupt, **columns)


TOOLS = {
    ("resid_pre", "position"): tl.get_act_patch_resid_pre,
    ("resid_mid", "position"): tl.get_act_patch_resid_mid,
    ("attn_out", "position"): tl.get_act_patch_attn_out,
    ("mlp_out", "position"): tl.get_act_patch_mlp_out,
    ("z", "head"): tl.get_act_patch_attn_head_out_all_pos,
    ("q", "head"): tl.get_act_patch_attn_head_q_all_pos,
    ("k", "head"): tl.get_act_patch_attn_head_k_all_pos,
    ("v", "head"): tl.get_act_patch_attn_head_v_all_pos,
    ("pattern", "head"): tl.get_act_patch_attn_head_pattern_all_pos,
    ("z", "head_position"): tl.get_act_patch_attn_head_out_by_pos,
    ("q", "head_position"): tl.get_act_patch_attn_head_q_by_pos,
    ("k", "head_position"): tl.get_act_patch_attn_head_k_by_pos,
    ("v", "head_position"): tl.get_act_patch_attn_head_v_by_pos,
    ("pattern", "head_position"): tl.get_act_patch_attn_head_pattern_by_pos,
    ("pattern", "head_query_key"): tl.get_act_patch_attn_head_pattern_dest_src_pos,
}

# From ours to the order of TransformerLens's axes.
AXES = {
    "position": ("layer", "edit_pos"),
    "head": ("layer", "head"),
    "head_position": ("layer", "edit_pos", "head"),
    "head_query_key": ("layer", "head", "query_pos", "key_pos"),
}


@pytest.mark.parametrize("tiny_name", ["gpt2", "llama-mha-tied"], indirect=True)
@pytest.mark.parametrize(("site", "by"), TOOLS)
def test_every_tool_of_transformer_lens(zoo, tiny_name, pairs, site, by):
    model, bridge = zoo.model(tiny_name), zoo.bridge(tiny_name)
    found = activation_patch(model, pairs, site, by=by)
    axes = ("layer", "head", "edit_pos") if (site, by) == ("pattern", "head_position") else AXES[by]
    largest = 0.0
    # Of the pairs, of which all but the last are padded, two; of as many runs as pairs of positions the shorter two.
    for row in (0, 1) if by == "head_query_key" else (0, 2):
        prompt, corrupt = pairs.prompts[row], pairs.corrupt[row]
        answer, wrong = pairs.answer[row], pairs.wrong[row]

        def metric(logits, answer=answer, wrong=wrong):
            return logits[0, -1, answer].squeeze() - logits[0, -1, wrong].squeeze()

        with torch.no_grad():
            _, cache = bridge.run_with_cache(torch.tensor([prompt]))
            expected = TOOLS[site, by](bridge, torch.tensor([corrupt]), cache, metric)
            base = float(metric(bridge(torch.tensor([corrupt]))))
            source = float(metric(bridge(torch.tensor([prompt]))))
        got = found[f"logit_diff_patch_{site}"][row]
        got = got.rename(kv_head="head") if "kv_head" in got.dims else got
        got = got.transpose(*axes)
        n = len(prompt)
        got = got.isel({dim: slice(n) for dim in axes if dim.endswith("pos")}).values
        assert got.shape == tuple(expected.shape)
        assert np.abs(got + base - expected.numpy()).max() < TOLERANCE
        assert abs(float(found["logit_diff_base"][row]) - base) < TOLERANCE
        assert abs(float(found["logit_diff_source"][row]) - source) < TOLERANCE
        largest = max(largest, float(np.abs(got).max()))
    assert largest > 1e-2


def captured(model, source, sites):
    """Values of sites in a run of one prompt, by site and layer."""
    taps = Taps.of(model.spec.n_layers, capture=sites)
    with torch.no_grad():
        forward(model.spec, model.weights, torch.tensor([source]), taps=taps)
    return taps.values


def literal(model, base, source, edit, values=None):
    """Logits of the last token of one pair with one patch; ``values`` are those of the source run, if known."""
    values = captured(model, source, [edit.site]) if values is None else values
    with torch.no_grad():
        edit = edit.sourced(values[edit.site, edit.layer])
        taps = Taps.of(model.spec.n_layers, edits=[edit])
        resid = forward(model.spec, model.weights, torch.tensor([base]), taps=taps)
        return final_logits(model.spec, model.weights, resid)[0, -1]


def written_out(metric, logits, base_logits, answer, wrong):
    logprobs, before = logits.log_softmax(-1), base_logits.log_softmax(-1)
    return float(
        {
            "logit_diff": lambda: logits[answer] - logits[wrong],
            "logprob": lambda: logprobs[answer],
            "prob": lambda: logprobs[answer].exp(),
            "kl": lambda: (before.exp() * (before - logprobs)).sum(),
            "rank": lambda: (logits > logits[answer]).sum(),
        }[metric]()
    )


METRICS = ("logit_diff", "logprob", "prob", "kl", "rank")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_family_site_and_way(zoo, name, pairs, direction):
    model = zoo.model(name, dtype=torch.float64)
    spec = model.spec
    ways = [
        ("layer", ["resid_post", "attn_out"]),
        ("position", ["resid_pre", "mlp_out"]),
        ("head", ["z", "q", "k", "v"]),
    ]
    ways += [("head_position", ["z", "k", "pattern"]), ("head", ["pattern"]), ("layer", ["post", "pattern"])]
    generator = torch.Generator().manual_seed(0)
    base_prompts, sources = pairs.corrupt, pairs.prompts
    if direction == "noise":
        base_prompts, sources = sources, base_prompts
    every_site = sorted({site for _, sites in ways for site in sites})
    values = [captured(model, source, every_site) for source in sources]
    # Patched with its own values, a prompt is as it is.
    own = Edit(site="resid_post", layer=0, replacement="source")
    clean_logits = [literal(model, base, base, own) for base in base_prompts]
    for by, sites in ways:
        found = activation_patch(model, pairs, sites, by=by, direction=direction, metric=METRICS)
        for site, row in itertools.product(sites, range(len(pairs.prompts))):
            base, source, before = base_prompts[row], sources[row], clean_logits[row]
            data = found[f"logit_diff_patch_{site}"]
            head_dim = next((dim for dim in data.dims if dim.endswith("head")), None)
            layer = int(torch.randint(spec.n_layers, (), generator=generator))
            head = None if head_dim is None else int(torch.randint(data.sizes[head_dim], (), generator=generator))
            at = None if "edit_pos" not in data.dims else int(torch.randint(len(base), (), generator=generator))
            positions = None if at is None else (torch.arange(len(base)) == at)[None]
            edit = Edit(site=site, layer=layer, head=head, positions=positions, replacement="source")
            patched = literal(model, base, source, edit, values[row])
            chosen = {"prompt": row, "layer": layer}
            chosen |= {} if head is None else {head_dim: head}
            chosen |= {} if at is None else {"edit_pos": at}
            for metric in METRICS:
                args = (pairs.answer[row], pairs.wrong[row])
                args = tuple(a[0] if isinstance(a, list | tuple) else a for a in args)
                value = written_out(metric, patched, before, *args)
                expected = value - written_out(metric, before, before, *args)
                got = float(found[f"{metric}_patch_{site}"].isel(chosen))
                assert abs(got - expected) < EXACT, (by, site, metric, chosen)


def test_positions_that_a_prompt_has_not_are_missing(zoo, pairs):
    model = zoo.model("llama-gqa")
    found = activation_patch(model, pairs, ["resid_pre", "k"], by="position")
    lengths = np.array([len(prompt) for prompt in pairs.prompts])
    for site in ("resid_pre", "k"):
        values = found[f"logit_diff_patch_{site}"].transpose("prompt", "edit_pos", "layer").values
        known = np.arange(values.shape[1]) < lengths[:, None]
        assert np.array_equal(np.isfinite(values).all(-1), known)
        assert np.array_equal(np.isnan(values).all(-1), ~known)


def test_patching_all_of_it_gives_the_source(zoo, pairs):
    model = zoo.model("gpt2", dtype=torch.float64)
    found = activation_patch(model, pairs, "resid_pre", by="layer")
    whole = found["logit_diff_base"] + found["logit_diff_patch_resid_pre"].isel(layer=0)
    assert float(np.abs(whole - found["logit_diff_source"]).max()) < EXACT


def test_neurons(zoo, pairs):
    model = zoo.model("llama-gqa", dtype=torch.float64)
    found = activation_patch(model, pairs, "post", by="neuron")["logit_diff_patch_post"]
    assert found.dims == ("prompt", "layer", "neuron")
    for row, layer, neuron in ((0, 0, 3), (1, 2, 7)):
        edit = Edit(site="post", layer=layer, neuron=neuron, replacement="source")
        base = literal(model, pairs.corrupt[row], pairs.corrupt[row], edit)
        patched = literal(model, pairs.corrupt[row], pairs.prompts[row], edit)
        args = [a[0] if isinstance(a, list | tuple) else a for a in (pairs.answer[row], pairs.wrong[row])]
        expected = written_out("logit_diff", patched, base, *args) - written_out("logit_diff", base, base, *args)
        assert abs(float(found[row, layer, neuron]) - expected) < EXACT


def test_company_changes_nothing(zoo, pairs):
    model = zoo.model("mistral-window")
    together = activation_patch(model, pairs, ["z", "v"], by="head_position")
    for row in range(len(pairs.prompts)):
        columns = {name: getattr(pairs, name)[row : row + 1] for name in ("answer", "wrong", "corrupt")}
        alone = activation_patch(
            model, PromptSet.of(pairs.prompts[row : row + 1], **columns), ["z", "v"], by="head_position"
        )
        for name in ("logit_diff_patch_z", "logit_diff_patch_v"):
            n = len(pairs.prompts[row])
            assert np.abs(together[name][row, :n].values - alone[name][0, :n].values).max() < 1e-5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sites": "resid"}, OptionError, "choose from 'resid_pre'"),
        ({"sites": ()}, OptionError, "give one of resid_pre"),
        ({"sites": ("z", "z"), "by": "head"}, OptionError, "different ones"),
        ({"sites": "resid_pre", "by": "head"}, OptionError, "does not fit the site 'resid_pre': choose from"),
        ({"sites": "z", "by": "neuron"}, OptionError, "choose from post"),
        ({"by": "token"}, OptionError, "by='token' is not known"),
        ({"direction": "up"}, OptionError, "direction='up' is not known"),
        ({"metric": "loss"}, MetricError, "such as 'logprob'"),
        ({"metric": ()}, OptionError, "give one metric"),
    ],
)
def test_what_does_not_go_together_is_refused(zoo, pairs, without_shape_checks, monkeypatch, options, error, message):
    from fastinterp.analyses import measuring

    monkeypatch.setattr(measuring, "forward_at", lambda *args, **kwargs: pytest.fail("it ran"))
    with pytest.raises(error, match=message):
        activation_patch(zoo.model("gpt2"), pairs, **options)


def test_pairs_are_needed(zoo, prompt_set, monkeypatch):
    from fastinterp.analyses import measuring

    monkeypatch.setattr(measuring, "forward_at", lambda *args, **kwargs: pytest.fail("it ran"))
    with pytest.raises(PromptPairError, match="corrupt="):
        activation_patch(zoo.model("gpt2"), prompt_set)
    with pytest.raises(OptionError, match="there is no resid_mid in a"):
        activation_patch(zoo.model("gpt-neox"), prompt_set, "resid_mid")
