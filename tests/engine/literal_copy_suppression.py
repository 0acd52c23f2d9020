"""What a head does to the loss of every token, written out on a Hugging Face GPT-2: no part of fastinterp is used."""

import torch


class Literal:
    """Every head of a GPT-2 taken away at every token, from the rest of the model or from the logits alone."""

    def __init__(self, hf_model, prompts):
        self.model, self.prompts = hf_model, [torch.tensor([ids]) for ids in prompts]
        self.blocks, self.ln_f = hf_model.transformer.h, hf_model.transformer.ln_f
        self.n_heads, self.d_head = hf_model.config.n_head, hf_model.config.n_embd // hf_model.config.n_head
        self.clean = [self.run(ids) for ids in self.prompts]
        self.means = [torch.cat([z[layer] for _, z, _ in self.clean]).mean(0) for layer in range(len(self.blocks))]

    @torch.no_grad()
    def run(self, ids, layer=None, of_head=None, value=None):
        """Logits ``[pos, d_vocab]``, the heads' values by layer, and what goes into the final norm."""
        z, final = {}, {}

        def attention(module, inputs, at):
            mixed = inputs[0].clone()
            if at == layer:
                mixed[..., of_head] = value
            z[at] = mixed[0]
            return (mixed,)

        hooks = [
            block.attn.c_proj.register_forward_pre_hook(lambda m, inputs, at=at: attention(m, inputs, at))
            for at, block in enumerate(self.blocks)
        ]
        hooks.append(self.ln_f.register_forward_pre_hook(lambda m, inputs: final.update(x=inputs[0][0])))
        try:
            logits = self.model(ids).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        return logits, z, final["x"]

    @torch.no_grad()
    def effect(self, row, layer, head, mode, effect):
        """Ablated minus clean loss, ``[pos - 1]``."""
        ids, (logits, z, final) = self.prompts[row], self.clean[row]
        columns = slice(head * self.d_head, (head + 1) * self.d_head)
        value = torch.zeros(self.d_head, dtype=final.dtype) if mode == "zero" else self.means[layer][columns]
        if effect == "total":
            after = self.run(ids, layer, columns, value)[0]
        else:
            written = (z[layer][:, columns] - value) @ self.blocks[layer].attn.c_proj.weight[columns]
            written = written - written.mean(-1, keepdim=True)
            scale = (final.var(-1, unbiased=False, keepdim=True) + self.ln_f.eps).sqrt()
            after = logits - written / scale * self.ln_f.weight @ self.model.lm_head.weight.T
        return self.loss(after, ids) - self.loss(logits, ids)

    def loss(self, logits, ids):
        return -logits.log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
