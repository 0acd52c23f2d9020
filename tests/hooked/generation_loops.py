"""Loops that read the whole text for every token, for the tests of generation."""

import torch

from fastinterp.model import Taps, final_logits, forward

N_NEW = 14
EOS = 0


def argmax_loop(next_logits, prompt, n_new=N_NEW, stop=()):
    """The definition: the whole text is read for every token."""
    new: list[int] = []
    while len(new) < n_new and not (new and new[-1] in stop):
        new.append(int(next_logits([*prompt, *new]).argmax()))
    return new


def until(tokens, stop):
    """``tokens`` up to and with the first one in ``stop``."""
    ends = [index for index, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0] + 1] if ends else tokens


def whole_text_logits(model, edits=()):
    def next_logits(tokens):
        taps = Taps.of(model.spec.n_layers)
        for site, edit in edits:
            taps.edits.setdefault(site, []).append(edit)
        with torch.no_grad():
            resid = forward(model.spec, model.weights, torch.tensor([tokens]), taps=taps)
            return final_logits(model.spec, model.weights, resid, taps=taps)[0, -1]

    return next_logits
