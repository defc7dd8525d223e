"""An independent statement of the published LaCT language model: one sequence, all at once, no state."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

D, LAYERS, VOCAB, LENGTH, HIDDEN = 16, 2, 23, 29, 32


def shapes_of(c: dict) -> dict[str, tuple[int, ...]]:
    n = c["num_lact_heads"]
    d, h, r = D // n, int(D // n * c.get("inter_multi", 1)), c.get("w0_w2_low_rank", -1)
    out = {"model.embeddings.weight": (VOCAB, D), "model.norm.weight": (D,)}
    if not c.get("tie_word_embeddings", False):
        out["lm_head.weight"] = (VOCAB, D)
    for i in range(LAYERS):
        layer = {
            "attn_norm.weight": (D,), "mlp_norm.weight": (D,), "mlp.gate_proj.weight": (HIDDEN, D),
            "mlp.up_proj.weight": (HIDDEN, D), "mlp.down_proj.weight": (D, HIDDEN), "attn.qkv.weight": (3 * D, D),
            "attn.o_proj.weight": (D, D), "attn.qk_scale": (D, 2), "attn.qk_offset": (D, 2), "attn.w1": (n, d, h),
            "attn.lr_proj.weight": (3 * n * c.get("lr_dim", 1), D), "attn.lr_proj.bias": (3 * n * c.get("lr_dim", 1),),
            "attn.ttt_norm.weight": (d,),
        }  # fmt: skip
        for w in ("w0", "w2"):
            factors = {f"attn.{w}.w_left": (n, h, r), f"attn.{w}.w_right": (n, r, d)}
            layer |= factors if r > 0 else {f"attn.{w}": (n, h, d)}
        if c.get("use_momentum", True):
            layer |= {"attn.momentum_proj.0.weight": (n, D), "attn.momentum_proj.0.bias": (n,)}
        if c.get("learnable_ttt_scale", True):
            layer |= {"attn.ttt_scale_proj.weight": (n, D), "attn.ttt_scale_proj.bias": (n,)}
        if c.get("qkv_bias", False):
            layer["attn.qkv.bias"] = (3 * D,)
        if c.get("attn_qk_norm", False):
            layer |= {"attn.q_norm.weight": (D,), "attn.k_norm.weight": (D,)}
        out |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return out


def random_weights(c: dict, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    weights = {}
    for name, shape in shapes_of(c).items():
        weights[name] = (torch.randn(shape, generator=random, dtype=torch.float64) * 0.4).to(dtype)
        if "norm" in name or "qk_scale" in name:
            weights[name] += 1
        if "lr_proj.bias" in name:
            weights[name] += 4  # rates near 0.05: learning that shows
    return weights


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rope(x: Tensor, base: float) -> Tensor:
    """x: [T, heads, width], token t at position t; complex rotation of channels (i, i + width/2)."""
    half = x.shape[-1] // 2
    rate = base ** (-torch.arange(half, dtype=torch.float32) / half)  # float32 tables, as published
    angle = (torch.arange(x.shape[0], dtype=torch.float32)[:, None] * rate)[:, None]
    z = torch.complex(x[..., :half], x[..., half:]) * torch.complex(angle.cos(), angle.sin())
    return torch.cat([z.real, z.imag], -1)


def orthogonal(g: Tensor, low: bool) -> Tensor:
    steps = [
        (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ]  # fmt: skip
    x = g.bfloat16() if low else g
    x = x.mT if g.shape[0] > g.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for a, b, c in steps:
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x.mT if g.shape[0] > g.shape[1] else x).to(g.dtype)


def fast_network(w: list[Tensor], c: dict, q, k, v, rates, b, low: bool) -> Tensor:
    """One sequence and head: q, k, v [T, d], rates [T, 3, R], b [T] or None."""

    def f(x):
        return (F.silu(x @ w[0].T) * (x @ w[2].T)) @ w[1].T

    size, out = c["lact_chunk_size"], []
    targets = [m.norm(dim=1, keepdim=True) for m in w]
    sums, momentum = list(w), [torch.zeros_like(m) for m in w]
    for start in range(0, q.shape[0], size):
        at = slice(start, start + size)
        out.append(f(q[at]))
        if start + size >= q.shape[0]:
            break
        # The gradient of sum_t <f(k_t), v_t> through autograd; the rates multiply what the matrix reads.
        leaves = [m.detach().requires_grad_() for m in w]
        kk = k[at]
        gate, up = (kk * rates[at, 0]) @ leaves[0].T, (kk * rates[at, 2]) @ leaves[2].T
        a, u = kk @ w[0].T, kk @ w[2].T
        # Same values as a and u, gradients with the rates in them.
        gate, up = a.detach() + gate - gate.detach(), u.detach() + up - up.detach()
        hidden = F.silu(gate) * up
        read = hidden @ w[1].detach().T + (hidden.detach() * rates[at, 1]) @ (leaves[1] - leaves[1].detach()).T
        direction = list(torch.autograd.grad((read * v[at]).sum(), leaves))
        if b is not None:
            momentum = direction = [g + b[at].mean() * m for g, m in zip(direction, momentum)]
        if c.get("use_muon", False) and c.get("use_fused_kernel", False):
            both = orthogonal(torch.cat([direction[0], direction[2]]), low)
            direction = [both[: len(w[0])], orthogonal(direction[1], low), both[len(w[0]) :]]
        elif c.get("use_muon", False):
            direction = [orthogonal(g, low) for g in direction]
        sums = [m + g for m, g in zip(sums if c.get("ttt_prenorm", False) else w, direction)]
        w[:] = [m / (m.norm(dim=1, keepdim=True) + 1e-5) * n for m, n in zip(sums, targets)]
    return torch.cat(out)


def layer(p: dict[str, Tensor], c: dict, x: Tensor, low: bool) -> Tensor:
    """The published layer on one sequence, x [T, D] normalised."""
    q, k, v = (x @ p["qkv.weight"].T + p.get("qkv.bias", 0)).split(D, -1)
    if "q_norm.weight" in p:
        q, k = rms(q, p["q_norm.weight"], 1e-5), rms(k, p["k_norm.weight"], 1e-5)
    length, base, heads, n = len(x), c["rope_theta"], c["num_attn_heads"], c["num_lact_heads"]
    aq, ak = (rope(z.view(length, heads, -1), base) for z in (q, k))
    score = torch.einsum("thd,shd->hts", aq, ak) / math.sqrt(D // heads)
    age = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (age < 0) | (age >= (c["window_size"] or length))
    seen = score.masked_fill(hidden, -math.inf).softmax(-1)
    attended = torch.einsum("hts,shd->thd", seen, v.view(length, heads, -1)).reshape(length, D)

    fq, fk = (z * p["qk_scale"][:, i] + p["qk_offset"][:, i] for i, z in enumerate((q, k)))
    fv = v
    if c.get("qkv_silu", True):
        fq, fk, fv = F.silu(fq), F.silu(fk), v if c.get("no_v_silu", False) else F.silu(v)
    fq, fk, fv = (z.view(length, n, -1) for z in (fq, fk, fv))
    fq, fk = (z / (z.norm(dim=-1, keepdim=True) + 1e-5) for z in (fq, fk))
    if not c.get("ttt_nope", False):
        fq, fk = (rope(z.reshape(length, heads, -1), base).reshape(z.shape) for z in (fq, fk))
    rates = F.softplus(x @ p["lr_proj.weight"].T + p["lr_proj.bias"] + math.log(math.expm1(0.001)))
    rates = rates.view(length, n, 3, -1)
    b = None
    if "momentum_proj.0.weight" in p:
        b = torch.sigmoid(x @ p["momentum_proj.0.weight"].T + p["momentum_proj.0.bias"])
    read = []
    for h in range(n):
        w = [p[m][h] if m in p else p[f"{m}.w_left"][h] @ p[f"{m}.w_right"][h] for m in ("w0", "w1", "w2")]
        if "w0" not in p:
            half = 0.5 * torch.eye(*w[0].shape, dtype=x.dtype)
            w[0], w[2] = w[0] + half, w[2] + half
        own = None if b is None else b[:, h]
        y = rms(fast_network(w, c, fq[:, h], fk[:, h], fv[:, h], rates[:, h], own, low), p["ttt_norm.weight"], 1e-5)
        if "ttt_scale_proj.weight" in p:
            y = y * F.silu(x @ p["ttt_scale_proj.weight"][h] + p["ttt_scale_proj.bias"][h])[:, None]
        read.append(y)
    return (attended + torch.cat(read, -1)) @ p["o_proj.weight"].T


def reference_logits(w: dict[str, Tensor], c: dict, tokens: Tensor, *, low: bool = True) -> Tensor:
    """[T] → [T, vocabulary]. low: Newton-Schulz in bfloat16, as published."""
    x = w["model.embeddings.weight"][tokens]
    for i in range(LAYERS):
        p = {name.removeprefix(f"model.layers.{i}."): t for name, t in w.items() if f".layers.{i}." in name}
        attn = {name.removeprefix("attn."): t for name, t in p.items() if name.startswith("attn.")}
        x = x + layer(attn, c, rms(x, p["attn_norm.weight"], 1e-6), low)
        y = rms(x, p["mlp_norm.weight"], 1e-6)
        x = (
            x
            + (F.silu(y @ p["mlp.gate_proj.weight"].T) * (y @ p["mlp.up_proj.weight"].T)) @ p["mlp.down_proj.weight"].T
        )
    return rms(x, w["model.norm.weight"], 1e-6) @ w.get("lm_head.weight", w["model.embeddings.weight"]).T
