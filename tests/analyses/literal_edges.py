"""Edge attribution by its definition: a copy of the residual for every reader, and outputs of heads written out."""

import numpy as np
import torch

from fastinterp.gradients.edges_nodes import destinations, edges_exist
from fastinterp.model import Edit, Taps, final_logits, forward
from fastinterp.model.model import Model, Origin
from fastinterp.model.spec import Attention, Mlp, ModelSpec, Norm, Position
from fastinterp.model.weights import BlockWeights, NormWeights, Weights
from fastinterp.prompts import PromptSet

EXACT = 1e-9


def pairs_of(token_prompts, answers):
    """Three pairs of different lengths: one differs at its end alone, one everywhere, one at its beginning."""
    rows = [row for row, prompt in enumerate(token_prompts) if 1 < len(prompt) < 8][:3]
    prompts = [token_prompts[row] for row in rows]
    generator = torch.Generator().manual_seed(3)
    corrupt = [torch.randint(1, 379, (len(prompt),), generator=generator).tolist() for prompt in prompts]
    corrupt[0][:-1] = prompts[0][:-1]
    corrupt[2][2:] = prompts[2][2:]
    columns = {name: [column[row] for row in rows] for name, column in answers.items()}
    return PromptSet.of(prompts, corrupt=corrupt, **columns)


def one(pairs, row):
    columns = {name: getattr(pairs, name)[row : row + 1] for name in ("answer", "wrong", "corrupt")}
    return PromptSet.of(pairs.prompts[row : row + 1], **columns)


def ids(pairs, row, direction):
    clean, corrupt = torch.tensor([pairs.prompts[row]]), torch.tensor([pairs.corrupt[row]])
    return (corrupt, clean) if direction == "denoise" else (clean, corrupt)


def words(pairs, row):
    return [w[0] if isinstance(w, list | tuple) else w for w in (pairs.answer[row], pairs.wrong[row])]


READS = ("q_input", "k_input", "v_input", "mlp_in")


def written_by_source(model, tokens):
    """What every source adds to the residual ``[source, pos, d_model]``, each head's output written out."""
    spec = model.spec
    taps = Taps.of(spec.n_layers, capture=["resid_pre", "result", "mlp_out", "attn_raw"])
    with torch.no_grad():
        forward(spec, model.weights, tokens, taps=taps)
    found = [taps.values["resid_pre", 0][0]]
    for layer, w in enumerate(model.weights.blocks):
        for head in range(spec.n_heads):
            result = taps.values["result", layer][0, :, head]
            if w.ln1_post is not None:
                assert spec.norm.kind == "rms"
                raw = taps.values["attn_raw", layer][0]
                result = result / (raw.square().mean(-1, keepdim=True) + spec.norm.eps).sqrt()
                result = result if w.ln1_post.w is None else result * w.ln1_post.w
            found.append(result)
        found.append(taps.values["mlp_out", layer][0])
    return torch.stack(found)


def metric_of(name, resid, model, base_tokens, answer, wrong, reference=None):
    logits = final_logits(model.spec, model.weights, resid)[0]
    logprobs = logits.log_softmax(-1)
    if name == "loss":
        return -logprobs[:-1].gather(1, base_tokens[0, 1:, None]).mean()
    if name == "kl":
        before = final_logits(model.spec, model.weights, reference)[0, -1].log_softmax(-1)
        return (before.exp() * (before - logprobs[-1])).sum()
    return {"logit_diff": logits[-1, answer] - logits[-1, wrong], "logprob": logprobs[-1, answer]}[name]


def literal(model, base, source, measure, points):
    """Scores ``[source, destination]``, edge by edge: autograd at a copy of the residual that each reader has."""
    spec = model.spec
    difference = written_by_source(model, source) - written_by_source(model, base)
    embedded = [written_by_source(model, tokens)[0] for tokens in (base, source)]
    exist = edges_exist(spec)
    scores = torch.zeros(exist.shape, dtype=torch.float64)
    for alpha, weight in points:
        start = ((1 - alpha) * embedded[0] + alpha * embedded[1])[None].requires_grad_()
        taps = Taps.of(
            spec.n_layers,
            capture=READS,
            edits=[Edit(site="resid_pre", layer=0, replacement=start)],
        )
        with torch.enable_grad():
            resid = forward(spec, model.weights, base, taps=taps)
            keys = [(name, layer) for layer in range(spec.n_layers) for name in READS]
            found = torch.autograd.grad(measure(resid), [*(taps.values[key] for key in keys), resid])
        gradients = dict(zip(keys, found[:-1], strict=True))
        for column, destination in enumerate(destinations(spec)):
            if destination.kind == "logits":
                gradient = found[-1][0]
            elif destination.kind == "mlp":
                gradient = gradients["mlp_in", destination.layer][0]
            else:
                gradient = gradients[f"{destination.kind}_input", destination.layer][0, :, destination.head]
            for row in np.flatnonzero(exist[:, column]):
                scores[row, column] += weight * float((difference[row] * gradient).sum())
    return np.where(exist, scores.numpy(), np.nan)


def by_hand():
    """Two layers of one head and one MLP, two numbers wide, an RMS norm and nothing else."""
    spec = ModelSpec(
        family="by hand",
        n_layers=2,
        d_model=2,
        d_vocab=4,
        n_ctx=1,
        norm=Norm(kind="rms", eps=0.0),
        position=Position(kind="learned"),
        attention=Attention(n_heads=1, n_kv_heads=1, d_head=1, scale=1.0, window=(None, None)),
        mlp=Mlp(kind="plain", d_mlp=1, activation="relu"),
    )

    def block(W_V, W_O, W_in, W_out):
        columns = [[1.0, 0.0], [0.0, 1.0], W_V]
        return BlockWeights(
            ln1=NormWeights(),
            W_QKV=torch.tensor(columns, dtype=torch.float64).T.contiguous(),
            b_QKV=None,
            W_O=torch.tensor([[W_O]], dtype=torch.float64),
            b_O=None,
            ln2=NormWeights(),
            W_gate_in=torch.tensor([[x] for x in W_in], dtype=torch.float64),
            b_gate_in=None,
            W_out=torch.tensor([W_out], dtype=torch.float64),
            b_out=None,
        )

    weights = Weights(
        W_E=torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64),
        W_pos=torch.zeros(1, 2, dtype=torch.float64),
        blocks=(
            block([1.0, 0.0], [0.0, 6.0], [0.0, 0.0], [0.0, 0.0]),
            block([1.0, 0.0], [30.0, 0.0], [1.0, 0.0], [-6.0, 0.0]),
        ),
        ln_final=NormWeights(),
        W_U=torch.tensor([[0.0, 0.0, 10.0, 0.0], [0.0] * 4], dtype=torch.float64),
        b_U=None,
    )
    return Model(spec=spec, weights=weights, tokenizer=None, origin=Origin(source="by hand"))
