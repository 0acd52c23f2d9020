"""Activations of every family: against hooks on the Hugging Face modules in float64, and against TransformerLens."""

import functools

import pytest
import torch

from fastinterp.errors import UnknownActivationError
from fastinterp.model import Capture, Taps, final_logits, forward
from fastinterp.model.forward import missing_because
from fastinterp.names import ACTIVATIONS

EXACT = 1e-9
"""Float64 on both sides."""

ANGLES = 1e-6
"""Sines and cosines are float32 in every dtype, as in Hugging Face."""

TOLERANCE = 1e-4
"""Against a bridge in float32."""


def available(spec):
    """Names that this architecture has."""
    return [name for name in ACTIVATIONS if missing_because(spec, name) is None]


def read(model, tokens):
    """Returns everything that can be captured."""
    taps = Taps.of(model.spec.n_layers, capture=available(model.spec))
    with torch.no_grad():
        final_logits(model.spec, model.weights, forward(model.spec, model.weights, tokens, taps=taps), taps=taps)
    return taps.values


# Hugging Face -----------------------------------------------------------------------------------------------------

SEPARATE = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
GATED = {"mlp_raw": "mlp.down_proj", "pre": "mlp.gate_proj", "pre_linear": "mlp.up_proj"}
LLAMA = {"ln2": "post_attention_layernorm", "o": "self_attn.o_proj", "attention": "self_attn"}
LLAMA |= GATED | {key: f"self_attn.{name}" for key, name in SEPARATE.items()}
POST_NORMS = {
    "ln1_post": "post_attention_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "ln2_post": "post_feedforward_layernorm",
}
LAYERS = {
    "gpt_neo": "transformer.h",
    "gptj": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}
MODULES = {
    "gpt_neo": {"ln2": "ln_2", "attention": "attn.attention", "o": "attn.attention.out_proj"}
    | {key: f"attn.attention.{name}" for key, name in SEPARATE.items()}
    | {"pre": "mlp.c_fc", "mlp_raw": "mlp.c_proj"},
    "gpt_neox": {"ln2": "post_attention_layernorm", "attention": "attention", "o": "attention.dense"}
    | {"qkv": "attention.query_key_value", "pre": "mlp.dense_h_to_4h", "mlp_raw": "mlp.dense_4h_to_h"},
    "gptj": {"attention": "attn", "o": "attn.out_proj", "pre": "mlp.fc_in", "mlp_raw": "mlp.fc_out"}
    | {key: f"attn.{name}" for key, name in SEPARATE.items()},
    "opt": {"ln2": "final_layer_norm", "attention": "self_attn", "o": "self_attn.out_proj"}
    | {key: f"self_attn.{name}" for key, name in SEPARATE.items()}
    | {"pre": "fc1", "mlp_raw": "fc2"},
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA | POST_NORMS,
    "gemma3_text": LLAMA | POST_NORMS,
    "phi": {"attention": "self_attn", "o": "self_attn.dense", "pre": "mlp.fc1", "mlp_raw": "mlp.fc2"}
    | {key: f"self_attn.{name}" for key, name in SEPARATE.items()},
    "phi3": {"ln2": "post_attention_layernorm", "attention": "self_attn", "o": "self_attn.o_proj"}
    | {"qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj", "mlp_raw": "mlp.down_proj"},
    "stablelm": LLAMA,
    "starcoder2": {"ln2": "post_attention_layernorm", "attention": "self_attn", "o": "self_attn.o_proj"}
    | {key: f"self_attn.{name}" for key, name in SEPARATE.items()}
    | {"pre": "mlp.c_fc", "mlp_raw": "mlp.c_proj"},
}


def hugging_face(hf_model, run, prompt, spec):
    """Activations of the checkpoint's own weights by name and layer, from hooks on its modules while ``run`` runs."""
    kind, n = hf_model.config.model_type, len(prompt)
    layers = hf_model.get_submodule(LAYERS.get(kind, "model.layers"))
    inputs, outputs, handles = {}, {}, []

    def keep(key):
        def hook(module, args, kwargs, output):
            inputs[key] = args[0] if args else kwargs["hidden_states"]
            outputs[key] = output

        return hook

    for layer, module in enumerate(layers):
        for name, path in ({"layer": ""} | MODULES[kind]).items():
            part = module.get_submodule(path)
            handles.append(part.register_forward_hook(keep((name, layer)), with_kwargs=True))
    try:
        run(prompt)
    finally:
        for handle in handles:
            handle.remove()

    def rows(x):
        return (x[0] if isinstance(x, tuple) else x).reshape(1, n, -1)

    def heads(x):
        return x.reshape(1, n, -1, spec.d_head)

    values = {}
    for layer in range(spec.n_layers):
        got = {name: rows(value) for (name, at), value in outputs.items() if at == layer}
        given = {name: rows(value) for (name, at), value in inputs.items() if at == layer}
        if kind == "gpt_neox":
            q, k, v = got["qkv"].view(1, n, spec.n_heads, 3, spec.d_head).unbind(3)
        elif kind == "phi3":
            sizes = [spec.n_heads, spec.attention.n_kv_heads, spec.attention.n_kv_heads]
            q, k, v = heads(got["qkv"]).split(sizes, dim=2)
            got["pre"], got["pre_linear"] = got["gate_up"].chunk(2, -1)
        else:
            q, k, v = heads(got["q"]), heads(got["k"]), heads(got["v"])
        found = {"q": q, "k": k, "v": v, "z": heads(given["o"]), "pattern": outputs["attention", layer][1]}
        found |= {"resid_pre": given["layer"], "resid_post": got["layer"], "attn_raw": got["o"]}
        found |= {"pre": got["pre"], "post": given["mlp_raw"], "mlp_raw": got["mlp_raw"]}
        found["attn_out"], found["mlp_out"] = got.get("ln1_post", got["o"]), got.get("ln2_post", got["mlp_raw"])
        found["mlp_in"] = given.get("ln2", given["layer"])
        if not spec.parallel:
            found["resid_mid"] = given["ln2"]
        if "pre_linear" in got:
            found["pre_linear"] = got["pre_linear"]
        values |= {(name, layer): value for name, value in found.items()}
    return values


STREAM = {"resid_pre", "resid_mid", "mlp_in", "resid_post", "attn_raw", "attn_out", "mlp_raw", "mlp_out"}


@pytest.mark.parametrize("processing", ["none", "transformer_lens"])
def test_every_value_equals_the_modules_of_hugging_face(zoo, family_name, token_prompts, exact_hf_logits, processing):
    model = zoo.model(family_name, processing=processing, dtype=torch.float64)
    raw = zoo.model(family_name, processing="none", dtype=torch.float64)
    spec = model.spec
    for prompt in (token_prompts[2], token_prompts[1], token_prompts[4]):
        values = read(model, torch.tensor([prompt]))
        run = functools.partial(exact_hf_logits, family_name)
        expected = hugging_face(zoo.hf_double(family_name), run, prompt, spec)
        for (name, layer), value in expected.items():
            if processing == "transformer_lens":
                value = as_processed(spec, raw.weights.blocks[layer], name, value)
            got = values[name, layer]
            assert got.shape == value.shape, (name, layer)
            assert float((got - value).abs().max()) < EXACT, (name, layer)
            # At one token there is nothing to choose between, and values may be small; elsewhere they are not.
            assert len(prompt) == 1 or float(value.std()) > 0.05, (name, layer)


def as_processed(spec, w, name, value):
    """What weight processing makes of a value: streams lose their mean, values what is the same at every position."""
    if name in STREAM and spec.norm.kind == "layer":
        return value - value.mean(-1, keepdim=True)
    if name in ("v", "z"):
        constant = torch.zeros(spec.attention.n_kv_heads, spec.d_head, dtype=value.dtype)
        if w.b_V is not None:
            constant = constant + w.b_V
        if w.ln1.b is not None:
            constant = constant + torch.einsum("d,hde->he", w.ln1.b, w.W_V)
        return value - (constant if name == "v" else constant.repeat_interleave(spec.attention.group, 0))
    return value


@pytest.mark.parametrize("processing", ["none", "transformer_lens"])
def test_what_hugging_face_has_no_module_for(zoo, family_name, token_prompts, processing):
    """Scores, scales, normalised residuals and results, written out from the values they are made of."""
    model = zoo.model(family_name, processing=processing, dtype=torch.float64)
    spec, attention = model.spec, model.spec.attention
    prompt = token_prompts[2]
    values = read(model, torch.tensor([prompt]))
    query, key = torch.arange(len(prompt))[:, None], torch.arange(len(prompt))[None]

    def check(name, layer, expected):
        assert values[name, layer].shape == expected.shape, (name, layer)
        assert float((values[name, layer] - expected).abs().max()) < EXACT, (name, layer)

    def check_norm(name, layer, x, eps=spec.norm.eps):
        if spec.norm.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        check(f"{name}_scale", layer, scale)
        check(f"{name}_normalized", layer, x / scale)

    for layer, w in enumerate(model.weights.blocks):
        at = {name: value for (name, where), value in values.items() if where == layer}
        q, k = (at["rot_q"], at["rot_k"]) if spec.position.kind == "rotary" else (at["q"], at["k"])
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(attention.group, 2)) * attention.scale
        if attention.softcap is not None:
            scores = attention.softcap * torch.tanh(scores / attention.softcap)
        window = attention.window[layer]
        allowed = (key <= query) & (query - key < (len(prompt) if window is None else window))
        assert bool((at["attn_scores"].masked_fill(allowed, -torch.inf) == -torch.inf).all())
        at["attn_scores"] = values["attn_scores", layer] = at["attn_scores"].masked_fill(~allowed, 0.0)
        check("attn_scores", layer, scores.masked_fill(~allowed, 0.0))
        check("pattern", layer, scores.masked_fill(~allowed, -torch.inf).softmax(-1))
        check("result", layer, torch.einsum("bphe,hed->bphd", at["z"], w.W_O))
        check_norm("ln1", layer, at["resid_pre"])
        check_norm("ln2", layer, at["resid_pre"] if spec.parallel else at["resid_mid"])
        for name, written in (("ln1_post", "attn_raw"), ("ln2_post", "mlp_raw")):
            if spec.post_norms:
                check_norm(name, layer, at[written])
        for name, n_heads in (("q_input", spec.n_heads), ("v_input", attention.n_kv_heads)):
            check(name, layer, at["resid_pre"].unsqueeze(2).expand(-1, -1, n_heads, -1))
    check_norm("ln_final", None, values["resid_post", spec.n_layers - 1])


def test_rotations_turn_queries_and_keys_after_their_norm(zoo, family_name, token_prompts):
    """Lengths stay, to the precision of float32 angles, and exactly: the first position, and what is not rotated."""
    model = zoo.model(family_name, dtype=torch.float64)
    spec = model.spec
    values = read(model, torch.tensor([token_prompts[2]]))
    if spec.position.kind != "rotary":
        assert not {"rot_q", "rot_k"} & {name for name, _ in values}
        return
    for layer, w in enumerate(model.weights.blocks):
        rope = spec.position.rope[layer]
        stretch = 1.0 if rope.scaling is None else float(torch.tensor(rope.scaling.attention_factor))
        for name, weight in (("q", w.q_norm), ("k", w.k_norm)):
            before, after = values[name, layer], values[f"rot_{name}", layer]
            if weight is not None:
                before = weight * before / (before.pow(2).mean(-1, keepdim=True) + spec.norm.eps).sqrt()
            turning = rope.dims
            assert float((after[..., turning:] - before[..., turning:]).abs().sum()) < EXACT
            assert float((after[:, 0, :, :turning] - stretch * before[:, 0, :, :turning]).abs().max()) < EXACT
            lengths = [x[..., :turning].pow(2).sum(-1).sqrt() for x in (before, after)]
            assert float((lengths[1] - stretch * lengths[0]).abs().max()) < ANGLES
            assert float((after - before)[:, 1:, :, :turning].abs().max()) > 0.1


@pytest.mark.parametrize(
    "name", ["resid_mid", "pos_embed", "pre_linear", "ln1_post_scale", "ln2_post_normalized", "rot_q"]
)
def test_what_an_architecture_lacks_is_refused(zoo, family_name, name):
    model = zoo.model(family_name)
    spec, layers = model.spec, model.spec.n_layers
    exists = {
        "resid_mid": not spec.parallel,
        "pos_embed": spec.position.kind == "learned",
        "pre_linear": spec.mlp.kind == "gated",
        "ln1_post_scale": spec.post_norms,
        "ln2_post_normalized": spec.post_norms,
        "rot_q": spec.position.kind == "rotary",
    }[name]
    taps = Taps.of(layers, capture=[Capture(name=name)])
    if exists:
        forward(spec, model.weights, torch.arange(4)[None], taps=taps)
        assert taps.values
        return
    with pytest.raises(UnknownActivationError, match=name):
        forward(spec, model.weights, torch.arange(4)[None], taps=taps)


NO_BRIDGE = {"gpt-neox-sequential-no-attention-bias-wide-head"}
NO_COMPATIBILITY = {"phi-gqa-wide-head"}

# TransformerLens --------------------------------------------------------------------------------------------------


NOT_CACHED = {"attn_in", "q_input", "k_input", "v_input", "mlp_in"}
"""Behind flags of the bridge."""

NO_HOOK = {
    "gpt_neo": {"result"},
    "gptj": {"result", "rot_q", "rot_k", "ln2_scale", "ln2_normalized"},
    "gpt_neox": {"rot_q", "rot_k"},
    "opt": {"result"},
    "phi": {"ln2_scale", "ln2_normalized"},
    "phi3": {"rot_q", "rot_k"},
}
"""By family, what a bridge of TransformerLens 4.3 has no value of; in GPT-J and Phi ln2 is ln1 once more."""

SCORES_ARE_THE_PATTERN = {"gpt_neo", "gptj", "opt"}
"""Families whose bridges put the pattern, after the softmax, where the scores belong."""


@pytest.mark.parametrize("compatibility", [False, True], ids=["raw", "compatibility"])
def test_every_value_equals_transformer_lens(zoo, family_name, token_prompts, compatibility):
    if family_name in NO_BRIDGE or (compatibility and family_name in NO_COMPATIBILITY):
        return
    bridge = zoo.bridge(family_name, compatibility=compatibility, dtype=torch.float32)
    model = zoo.model(family_name, processing="transformer_lens" if compatibility else "none")
    spec, has_result = model.spec, "result" not in NO_HOOK.get(model.spec.family, ())
    for prompt in (token_prompts[2], token_prompts[1]):
        tokens = torch.tensor([prompt])
        bridge.set_use_attn_result(has_result)
        try:
            with torch.no_grad():
                _, cache = bridge.run_with_cache(tokens)
        finally:
            bridge.set_use_attn_result(False)
        values = read(model, tokens)
        absent = {name for name, at in values if ACTIVATIONS[name].hook.format(layer=at) not in cache.cache_dict}
        assert absent == NOT_CACHED | NO_HOOK.get(spec.family, set())
        for (name, layer), value in values.items():
            if name in absent:
                continue
            expected = cache[ACTIVATIONS[name].hook.format(layer=layer)]
            if name == "attn_scores" and spec.family in SCORES_ARE_THE_PATTERN:
                assert float((expected - values["pattern", layer]).abs().max()) < TOLERANCE
                continue
            # Inside its MLP, OPT folds batch and position into one axis.
            expected = expected.unsqueeze(0) if spec.family == "opt" and expected.ndim == 2 else expected
            assert expected.shape == value.shape, (name, layer)
            allowed = torch.isfinite(value)
            assert float((value - expected)[allowed].abs().max()) < TOLERANCE, (name, layer)
