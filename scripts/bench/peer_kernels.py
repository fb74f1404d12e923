"""Single operations in PyTorch: each case has run() and values(), the results of the last run in our packed layout."""
import math

import numpy as np
import torch
import torch.nn.functional as F

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def bits(n, seed):
    """n 32-bit hashes of (seed, index); `bits` in data.ts is the same function."""
    x = np.arange(n, dtype=np.uint32) + np.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x


def values(shape, seed, scale=1.0, dtype="f32"):
    """Uniform in [-scale, scale), the same numbers as `floats` in data.ts."""
    n = math.prod(shape)
    v = ((bits(n, seed) >> np.uint32(8)).astype(np.float64) / 8388608.0 - 1.0) * scale
    return torch.from_numpy(v.astype(np.float32).reshape(shape)).to(DTYPES[dtype])


def integers(n, seed, low, high):
    return torch.from_numpy((low + bits(n, seed) % np.uint32(high - low)).astype(np.int64))


class Gemm:
    def __init__(self, m, n, k, trans, dtype):
        self.a = values((k, m), 1, 1, dtype).t() if trans == "TN" else values((m, k), 1, 1, dtype)
        self.b = values((n, k), 2, 1, dtype).t() if trans == "NT" else values((k, n), 2, 1, dtype)
        self.out = torch.empty(m, n, dtype=DTYPES[dtype])

    def run(self):
        torch.mm(self.a, self.b, out=self.out)

    def values(self):
        return {"c": self.out}


class Differentiated:
    """inputs -> one output; run() goes forward, and back from a fixed gradient when there is one."""

    def __init__(self, inputs, seed):
        self.inputs = inputs
        self.seed = seed
        self.out = None
        for x in inputs.values():
            x.requires_grad_(seed is not None)

    def forward(self):
        raise NotImplementedError

    def run(self):
        if self.seed is None:
            with torch.no_grad():
                self.out = self.forward()
            return
        for x in self.inputs.values():
            x.grad = None
        self.out = self.forward()
        self.out.backward(self.seed)

    def values(self):
        grads = {"d_" + name: x.grad for name, x in self.inputs.items() if x.grad is not None}
        return {"out": self.out, **grads}


class Attention(Differentiated):
    """[B, H, S, D] contiguous, SDPA's best layout; the numbers are those of our rows [B*S, H*D]."""

    def __init__(self, batch, heads, length, dim, causal, dtype, backward):
        make = lambda seed: values((batch, length, heads, dim), seed, 1, dtype).transpose(1, 2).contiguous()
        self.causal = causal
        super().__init__({"q": make(1), "k": make(2), "v": make(3)}, make(4) if backward else None)

    def forward(self):
        return F.scaled_dot_product_attention(*self.inputs.values(), is_causal=self.causal)

    def values(self):
        return {name: x.transpose(1, 2) for name, x in super().values().items()}


class PackedAttention(Differentiated):
    """Sequences of uneven lengths, padded on the right. Causal rows never see the padding, so SDPA needs no mask: its
    fastest way."""

    def __init__(self, lengths, heads, dim, dtype):
        self.lengths = lengths
        self.heads, self.dim = heads, dim
        total = sum(lengths)
        make = lambda seed: self.pad(values((total, heads, dim), seed, 1, dtype))
        super().__init__({"q": make(1), "k": make(2), "v": make(3)}, make(4))

    def pad(self, rows):
        out = torch.zeros(len(self.lengths), max(self.lengths), self.heads, self.dim, dtype=rows.dtype)
        for b, part in enumerate(rows.split(self.lengths)):
            out[b, : len(part)] = part
        return out.transpose(1, 2).contiguous()

    def forward(self):
        return F.scaled_dot_product_attention(*self.inputs.values(), is_causal=True)

    def values(self):
        rows = lambda x: torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(self.lengths)])
        return {name: rows(x.detach()) for name, x in super().values().items()}


class AdamW:
    def __init__(self, shapes, lr):
        self.parameters = [torch.nn.Parameter(values(s, 2 * i, 0.02)) for i, s in enumerate(shapes)]
        for i, p in enumerate(self.parameters):
            p.grad = values(shapes[i], 2 * i + 1, 1e-3)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0, fused=True)

    def run(self):
        self.optimizer.step()

    def values(self):
        return {str(i): self.parameters[i] for i in (0, 2, 7, len(self.parameters) - 1)}


class Pointwise(Differentiated):
    def __init__(self, name, rows, width, dtype):
        weights = name in ("rmsNorm", "layerNorm")
        inputs = {"x": values((rows, width), 1, 1, dtype)}
        if weights:
            inputs["w"] = 1 + values((width,), 2, 0.5, dtype)
        if name == "layerNorm":
            inputs["b"] = values((width,), 3, 0.5, dtype)
        if name == "siluMul":
            inputs["up"] = values((rows, width), 3, 1, dtype)
        self.apply = getattr(self, name)
        super().__init__(inputs, values((rows, width), 4, 1, dtype))

    def forward(self):
        return self.apply(**self.inputs)

    def rmsNorm(self, x, w):
        return F.rms_norm(x, (x.shape[-1],), w, 1e-5)

    def layerNorm(self, x, w, b):
        return F.layer_norm(x, (x.shape[-1],), w, b, 1e-5)

    def gelu(self, x):
        return F.gelu(x)

    def siluMul(self, x, up):
        return F.silu(x) * up


def mix(x, weight, bias, embed, table, w0, b0, w1, b1, ids):
    """Last projector layer, gate over the dot products with the mean text embedding, and the splice.

    x [M, P, F], ids [M, L] -> [M, 3 + P + L - 1, H]: BOS, alignment row, picture rows, text
    """
    rows = F.linear(x, weight, bias)
    text = F.embedding(ids, embed)
    dots = torch.einsum("mph,mh->mp", rows, text.mean(1))
    local = F.linear(F.gelu(F.linear(dots, w0, b0)), w1, b1).softmax(-1)
    align = local @ table[:-1] + table[-1]
    bos = F.embedding(torch.ones(len(ids), 1, dtype=torch.long), embed)
    return torch.cat((bos, align[:, None], rows, text), 1)


class AlignMix(Differentiated):
    """The table is frozen, as in instruction tuning; everything else is trained."""

    def __init__(self, images, patches, features, hidden, text, vocab, levels, dtype, compiled):
        inputs = {
            "x": values((images, patches, features), 1, 1, dtype),
            "weight": values((hidden, features), 2, features**-0.5, dtype),
            "bias": values((hidden,), 3, 0.1, dtype),
            "embed": values((vocab, hidden), 4, 0.1, dtype),
            "w0": values((256, patches), 6, patches**-0.5, dtype),
            "b0": values((256,), 7, 0.1, dtype),
            "w1": values((levels - 1, 256), 8, 0.1, dtype),
            "b1": values((levels - 1,), 9, 0.1, dtype),
        }
        self.table = values((levels, hidden), 5, 0.1, dtype)
        self.ids = integers(images * text, 10, 2, vocab).view(images, text)
        self.mix = torch.compile(mix) if compiled else mix
        super().__init__(inputs, values((images, 2 + patches + text, hidden), 11, 0.1, dtype))

    def forward(self):
        return self.mix(table=self.table, ids=self.ids, **self.inputs)


class LMHead(Differentiated):
    """LM head on all rows, then the loss, as the usual training code does it."""

    def __init__(self, rows, hidden, vocab, every, dtype):
        inputs = {"hidden": values((rows, hidden), 1, 1, dtype), "weight": values((vocab, hidden), 2, 0.05, dtype)}
        self.labels = integers(rows, 3, 0, vocab)
        self.labels[torch.arange(rows) % every != 0] = -100
        super().__init__(inputs, torch.ones(()))

    def forward(self):
        logits = F.linear(self.inputs["hidden"], self.inputs["weight"])
        return F.cross_entropy(logits.float(), self.labels)


KINDS = {
    "gemm": Gemm,
    "attention": Attention,
    "packed_attention": PackedAttention,
    "adamw": AdamW,
    "pointwise": Pointwise,
    "alignmix": AlignMix,
    "lmhead": LMHead,
}
