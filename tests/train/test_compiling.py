"""What compiled blocks compute, beside what test_loop.py says of whole runs."""

import torch

from fastweight.train.compiling import tracing


def gradient(run) -> torch.Tensor:
    x, w = (torch.randn(8, 8, generator=torch.Generator().manual_seed(n), requires_grad=True) for n in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        y = run(x, w)
    return torch.autograd.grad(y.square().sum(), w)[0]


def test_derivatives_of_what_autocast_is_kept_away_from_are_not_rounded():
    def wide(x, w):
        with torch.autocast("cpu", enabled=False):
            return x @ w

    with tracing():
        assert torch.equal(gradient(torch.compile(wide, backend="aot_eager")), gradient(wide))
