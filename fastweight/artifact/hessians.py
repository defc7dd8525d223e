"""Second moments of what every linear layer reads, over calibration text: H = Σ x xᵀ."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastweight import ranks
from fastweight.configs import require
from fastweight.data import Batch
from fastweight.model import Model

Hessians = dict[str, Tensor]


@torch.no_grad()
def collect_hessians(model: Model, batches: Iterable[Batch | Tensor]) -> Hessians:
    """Σ x xᵀ, float64 [inputs, inputs], over all tokens that each weight matrix of `model` meets, by tensor name.

    batches: what the model reads, tokens [B, T] or batches of the data loader; each row starts from a fresh state.
    A block that is visited several times adds up all its visits. The head, or the embedding that serves as one, reads
    the output of the last norm. Under torch.distributed the sums run over all ranks; every rank must call this, and
    may bring its own number of batches; if one fails, all raise. A layer that is never called (its owner uses its
    weight some other way) is left out. Raises ValueError for sums that are not finite, by name, and if there is no
    batch on any rank.
    """
    layers = {f"{name}.weight": part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    output = "embedding.weight" if model.head is None else "head.weight"
    sizes = {name: part.in_features for name, part in layers.items()} | {output: model.config.d_model}
    sums = {n: torch.zeros(s, s, dtype=torch.float64, device=model.device) for n, s in sorted(sizes.items())}
    counts = dict.fromkeys(sums, 0)

    def add(name: str, x: Tensor) -> None:
        flat = x.detach().flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))
        sums[name] += flat.t() @ flat
        counts[name] += len(flat)

    # The head is not called: its input is at hand without the cost of the logits.
    handles = [part.register_forward_pre_hook(_hook(name, add)) for name, part in layers.items() if name != output]
    training = model.training
    model.eval()
    try:
        with ranks.together("reading calibration text"):
            for batch in batches:
                add(output, _features(model, batch))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return _finish(sums, counts)


def _features(model: Model, batch: Batch | Tensor) -> Tensor:
    tokens, cu_seqlens = (batch, None) if isinstance(batch, Tensor) else (batch.tokens, batch.cu_seqlens)
    return model.features(tokens.to(model.device), None, cu_seqlens)[0]


def _hook(name: str, add):
    return lambda _module, inputs: add(name, inputs[0])


def _finish(sums: Hessians, counts: dict[str, int]) -> Hessians:
    """Add up the ranks, then check, so that all ranks stop or none."""
    device = next(iter(sums.values())).device
    totals = torch.tensor(list(counts.values()), dtype=torch.int64, device=device)
    if ranks.num_ranks() > 1:
        for value in (*sums.values(), totals):
            torch.distributed.all_reduce(value)
    seen = dict(zip(counts, totals.tolist(), strict=True))
    require(any(seen.values()), "calibration: there is no batch. Give at least one batch of tokens.")
    bad = [name for name, value in sums.items() if not bool(value.isfinite().all())]
    require(
        not bad,
        f"calibration: the Hessians of {', '.join(bad[:8])} are not finite. The activations overflow on this text; "
        "look for a diverged model, or calibrate in float32.",
    )
    return {name: value for name, value in sums.items() if seen[name]}
