"""What a model may learn about its residual stream: mixing with the embedding, weights, skips, a gate over time."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RESIDUALS = ("sequential", "parallel", "lanes")
FACTORS = ("none", "scalar", "channel")
SKIPS = ("none", "add", "gated")


class ResidualWeights(nn.Module):
    """Weights of one block's residual stream, one set shared by all its visits or one per visit.

    u = a·x + b·x0 is what the block reads in place of x (a = 1, b = 0 at first; x0 is the embedding), then
    x = u + A·mixer(u) and x += M·feed_forward(x), A and M scalars or per channel, 1 at first.
    lanes: there are two streams, of which mixer and feed-forward each read one; lane i gets w_i0 A·mixer + w_i1
    M·feed_forward, all four w 1 at first.
    Source: x0 mixing and per-channel factors as in modded-nanogpt and the Parameter Golf baseline, lanes as in its
    records.
    """

    def __init__(self, d_model: int, *, x0_mix: bool, factors: str, feeds: bool, visits: int, lanes: bool = False):
        super().__init__()
        width = {"none": 0, "scalar": 1, "channel": d_model}[factors]
        self.stream = _vectors(d_model, visits) if x0_mix else None
        self.x0 = _vectors(d_model, visits) if x0_mix else None
        self.mixer = _vectors(width, visits) if width else None
        self.feed_forward = _vectors(width, visits) if width and feeds else None
        self.lanes = _vectors(4, visits) if lanes else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The plain residual stream: a, A, M and w are 1, b is 0."""
        for name, vector in self.named_parameters():
            vector.fill_(0.0 if name.startswith("x0.") else 1.0)

    def read(self, x: Tensor, x0: Tensor, visit: int) -> Tensor:
        """u of a visit: a·x + b·x0, or x itself."""
        if self.stream is None or self.x0 is None:
            return x
        return self.stream[visit].to(x.dtype) * x + self.x0[visit].to(x.dtype) * x0

    def weigh_mixer(self, y: Tensor, visit: int) -> Tensor:
        """A·y."""
        return y if self.mixer is None else self.mixer[visit].to(y.dtype) * y

    def weigh_feed_forward(self, y: Tensor, visit: int) -> Tensor:
        """M·y."""
        return y if self.feed_forward is None else self.feed_forward[visit].to(y.dtype) * y

    def write(self, lanes: Tensor, mixed: Tensor, fed: Tensor, visit: int) -> Tensor:
        """Both lanes [2, B, T, D] after what mixer and feed-forward say to them, each [B, T, D]."""
        assert self.lanes is not None
        (w00, w01), (w10, w11) = self.lanes[visit].to(lanes.dtype).view(2, 2).unbind(0)
        return lanes + torch.stack([w00 * mixed + w01 * fed, w10 * mixed + w11 * fed])


class Skips(nn.Module):
    """U-Net skips: the first half of the visits leave their outputs, the second half take them, the last one first.

    With s the output taken and w per channel, a visit of the second half reads x + w·s ("add"), or, with a gate g per
    channel, lerp(w·s, x, σ(g)) ("gated"). w = 1 and g = 0 at first. Skip i is that of the i-th visit from the middle,
    so an order with fewer visits uses the first ones. In an odd order the last visit takes none.
    Source: the Parameter Golf baseline ("add") and its later records ("gated").
    """

    def __init__(self, d_model: int, kind: str, visits: int):
        super().__init__()
        self.weight = _vectors(d_model, visits // 2)
        self.gate = _vectors(d_model, visits // 2) if kind == "gated" else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """w = 1, g = 0."""
        for name, vector in self.named_parameters():
            vector.fill_(0.0 if name.startswith("gate.") else 1.0)

    def forward(self, x: Tensor, kept: Tensor, number: int) -> Tensor:
        """What visit `number` of the second half reads; kept: the output that the first half left for it."""
        skip = self.weight[number].to(x.dtype) * kept
        if self.gate is None:
            return x + skip
        return torch.lerp(skip, x, self.gate[number].sigmoid().to(x.dtype))


class SmearGate(nn.Module):
    """x_t += λ σ(w·x_t[:width]) x_{t-1}: every embedding also says a little of the one before it.

    The first token of a sequence has none before it. λ and w are 0 at first. Source: modded-nanogpt.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.amount = nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """λ = 0: nothing is smeared."""
        self.weight.zero_()
        self.amount.zero_()

    def forward(self, x: Tensor, last: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, D] (or packed [1, total, D]) smeared; and the last embedding of each sequence, not smeared.

        last: [N, 1, D], the embedding before x in each sequence, zeros at its start.
        """
        before, last = shift(x, last, cu_seqlens)
        gate = F.linear(x[..., : self.weight.numel()], self.weight.to(x.dtype)[None]).sigmoid()
        return x + self.amount.to(x.dtype) * gate * before, last


def shift(x: Tensor, last: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """x moved on by one token, each sequence beginning with its `last` [N, 1, D]; and the new last tokens."""
    last = last.to(x.dtype)
    if cu_seqlens is None:
        # A copy: a view would keep everything that was read alive for as long as the state lives.
        return torch.cat([last, x[:, :-1]], 1), x[:, -1:].clone()
    ends = cu_seqlens.to(x.device, torch.int64)
    before = x.roll(1, 1).index_copy(1, ends[:-1], last.transpose(0, 1))
    return before, x[0, ends[1:] - 1].unsqueeze(1)


def _vectors(width: int, count: int) -> nn.ParameterList:
    """Vectors rather than a matrix: they are vectors to the optimiser too, and an unused one has no gradient."""
    return nn.ParameterList(nn.Parameter(torch.ones(width)) for _ in range(count))
