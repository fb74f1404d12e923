"""PyTorch's side of native/bench/cuda.cc: the same rows by the same names, one JSON line each.

    python3 scripts/bench/cuda_peer.py ['"date":"...","commit":"..."']
"""

import json
import sys
from contextlib import contextmanager

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

CONTEXT = json.loads("{" + (sys.argv[1] if len(sys.argv) > 1 else "") + "}")
DEVICE = torch.cuda.get_device_name()


def bf16(*shape, grad=False):
    return (torch.rand(*shape, device="cuda") - 0.5).bfloat16().requires_grad_(grad)


def row(name, work, moved, f):
    """Fastest of five rounds of f; `work` is bytes when `moved`, else floating point operations."""

    def ms(times):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(times):
            f()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / times

    f()
    once = ms(3)
    times = 2 if once > 50 else int(100 / once) + 1
    best = min(ms(times) for _ in range(5))
    unit, scale = ("GB/s", 1e6) if moved else ("TFLOP/s", 1e9)
    line = {"row": name, "ms": round(best, 4), unit: round(work / best / scale, 1), "device": DEVICE}
    print(json.dumps({**line, "peer": f"torch {torch.__version__}", **CONTEXT}), flush=True)


@contextmanager
def labelled(label):
    CONTEXT["backend"] = label
    try:
        yield
    finally:
        del CONTEXT["backend"]


def attempt(name, f):
    """What one part cannot do is a line; the others follow."""
    try:
        f()
    except Exception as error:
        print(json.dumps({"row": name, "failed": (str(error) or repr(error)).splitlines()[0], "peer": "torch", **CONTEXT}), flush=True)
    torch.cuda.empty_cache()


def copies():
    x, y = bf16(1 << 29), bf16(1 << 29)
    row("copy bf16 2^29", 4 << 29, True, lambda: y.copy_(x))


def norms():
    x, w, dy = bf16(16384, 4096, grad=True), bf16(4096, grad=True), bf16(16384, 4096)
    n = x.numel()
    row("rmsNorm forward bf16 16384x4096", 4 * n, True, lambda: F.rms_norm(x.detach(), (4096,), w.detach(), 1e-5))
    y = F.rms_norm(x, (4096,), w, 1e-5)
    row("rmsNorm gradient bf16 16384x4096", 6 * n, True, lambda: torch.autograd.grad(y, (x, w), dy, retain_graph=True))
    row("siluMul forward bf16 2^26", 6 * n, True, lambda: F.silu(x.detach()) * dy)


def optimizer():
    """Fused AdamW keeps bf16 moments and no master: 14 bytes of traffic a parameter against 18 of the compact state."""
    p = bf16(1 << 30, grad=True)
    p.grad = bf16(1 << 30)
    step = torch.optim.AdamW([p], lr=1e-5, fused=True)
    row("adamw compact bf16 2^30", 14 << 30, True, step.step)


def loss():
    hidden, w, logits = bf16(600, 4096), bf16(32000, 4096), bf16(600, 32000, grad=True)
    target = torch.arange(600, device="cuda") * 53
    row("lmHead product bf16 600x32000x4096", 2 * 600 * 32000 * 4096, False, lambda: hidden @ w.T)
    row(
        "lmHead loss bf16 600x32000",
        4 * logits.numel(),
        True,
        lambda: torch.autograd.grad(F.cross_entropy(logits.float(), target), logits),
    )


def products():
    for n in (4096, 8192):
        a, b = bf16(n, n), bf16(n, n)
        row(f"gemm bf16 {n}^3", 2 * n**3, False, lambda: a @ b.T)


def causal_attention(name, lengths, dim):
    """Padded to the longest sequence. `work` counts the pairs that matter, and causal needs no mask for what stands behind the end."""
    heads, batch, length = 2048 // dim, len(lengths), max(lengths)
    q, k, v = (bf16(batch, heads, length, dim, grad=True) for _ in range(3))
    g = bf16(batch, heads, length, dim)
    product = heads * sum(n * n for n in lengths) * dim

    def forward():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def both():
        with torch.no_grad():
            row(f"{name} forward", 2 * product, False, forward)
        o = forward()
        row(f"{name} gradient", 5 * product, False, lambda: torch.autograd.grad(o, (q, k, v), g, retain_graph=True))

    for backend, label in ((SDPBackend.FLASH_ATTENTION, "FA2"), (SDPBackend.CUDNN_ATTENTION, "cuDNN")):
        with sdpa_kernel(backend), labelled(label):
            attempt(name, both)


def attention():
    for dim in (64, 128):
        for length in (1024, 2048, 4096):
            causal_attention(f"attention causal bf16 d{dim} s{length}", [length] * (16384 // length), dim)
        conversations = [590 + i * i * 1458 // 225 for i in range(16)]
        causal_attention(f"attention causal bf16 d{dim} 16 of 590 to 2048", conversations, dim)


def decode():
    """Against a cache without pages."""
    for kv_heads in (32, 8):
        q, k, v = bf16(8, 32, 1, 128), bf16(8, kv_heads, 4096, 128), bf16(8, kv_heads, 4096, 128)
        attend = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=kv_heads < 32)
        row(f"attentionCached bf16 8x4096 d128 32:{kv_heads}", 4 * k.numel(), True, attend)


def embedding():
    ids, rows, to = torch.arange(10000, device="cuda") * 7919 % 32000, bf16(10000, 4096), torch.zeros(32000, 4096, device="cuda")
    row("embedding gradient bf16 10000x4096", 10000 * 4096 * 10, True, lambda: to.index_add_(0, ids, rows.float()))


def align_mix():
    """The unfused projector layer, gate, mix and splice."""
    images, patches, width, words = 16, 576, 4096, 32
    x, w, b, embed = bf16(images, patches, width, grad=True), bf16(width, width, grad=True), bf16(width, grad=True), bf16(32000, width)
    table = bf16(8, width, grad=True)
    gate = [bf16(256, patches, grad=True), bf16(256, grad=True), bf16(7, 256, grad=True), bf16(7, grad=True)]
    ids = torch.arange(images * words, device="cuda").view(images, words)

    def forward():
        rows, text = F.linear(x, w, b), F.embedding(ids, embed)
        dots = torch.einsum("mph,mh->mp", rows, text.mean(1))
        mix = torch.softmax(F.linear(F.gelu(F.linear(dots, gate[0], gate[1])), gate[2], gate[3]), -1)
        return torch.cat([(mix @ table[:7] + table[7])[:, None], rows, text], 1)

    product = 2 * images * patches * width * width
    grads = (x, w, b, table, *gate)
    torch._functorch.config.donated_buffer = False  # a compiled gradient runs more than once

    def both(run):
        with torch.no_grad():
            row("alignMix forward bf16 16x576x4096", product, False, run)
        out = run()
        d_out = out.detach().clone()
        row("alignMix gradient bf16 16x576x4096", 2 * product, False, lambda: torch.autograd.grad(out, grads, d_out, retain_graph=True))

    for label, run in (("eager", forward), ("compiled", torch.compile(forward))):
        with labelled(label):
            attempt(f"alignMix {label}", lambda: both(run))


def layers():
    """The layers of transformers' LLaMA with SDPA, gradients added to what is there."""
    count, batch, length, hidden, heads, inner = 4, 16, 640, 4096, 32, 11008
    dim = hidden // heads
    shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner), (hidden,), (hidden,)]
    stack = [[bf16(*shape, grad=True) for shape in shapes] for _ in range(count)]
    x, seed = bf16(batch, length, hidden, grad=True), bf16(batch, length, hidden)
    cos = sin = torch.zeros(length, dim, device="cuda", dtype=torch.bfloat16)

    def rope(t):
        return t * cos + torch.cat((-t[..., dim // 2 :], t[..., : dim // 2]), -1) * sin

    def split(t):
        return t.view(batch, length, heads, dim).transpose(1, 2)

    def layer(x, q, k, v, o, gate, up, down, norm1, norm2):
        n = F.rms_norm(x, (hidden,), norm1, 1e-5)
        a = F.scaled_dot_product_attention(
            rope(split(F.linear(n, q))), rope(split(F.linear(n, k))), split(F.linear(n, v)), is_causal=True
        )
        h = x + F.linear(a.transpose(1, 2).reshape(batch, length, hidden), o)
        m = F.rms_norm(h, (hidden,), norm2, 1e-5)
        return h + F.linear(F.silu(F.linear(m, gate)) * F.linear(m, up), down)

    def run():
        y = x
        for weights in stack:
            y = layer(y, *weights)
        y.backward(seed)

    tokens = batch * length
    work = 6 * count * (4 * hidden**2 + 3 * hidden * inner) * tokens + count * 7 * tokens * length * hidden
    row("4 layers of a 7B forward+backward bf16 16x640", work, False, run)


for part in (copies, norms, optimizer, loss, products, attention, decode, embedding, align_mix, layers):
    attempt(part.__name__, part)
