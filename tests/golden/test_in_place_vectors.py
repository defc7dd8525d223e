"""A golden vector of the In-Place feed-forward, computed once in float64 with the published code's formulas.

Every input is a sine or cosine of its flat row-major index from 0.
"""

import math

import pytest
import torch

from fastweight.in_place import InPlaceFeedForward
from fastweight.layers import FeedForwardConfig, InPlaceConfig

D, I, CHUNK, TOKENS = 4, 6, 4, 10
# Token: output. Chunk 1 is the first that reads an update, chunk 2 stays unfinished.
OUTPUTS = {
    0: (-0.177532, -0.318054, -0.426919, -0.493291),
    3: (-0.299761, -0.257470, -0.189551, -0.102766),
    4: (-0.151279, -0.266902, -0.361371, -0.404299),
    7: (-0.367274, -0.340909, -0.284708, -0.189718),
    8: (-0.258763, -0.380806, -0.466990, -0.499678),
    9: (0.126775, 0.015232, -0.098457, -0.199785),
}


def wave(function, *shape: int, factor: float, rate: float, shift: float) -> torch.Tensor:
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    return factor * function(rate * n + shift).view(shape)


def layer(backend: str) -> InPlaceFeedForward:
    memory = InPlaceConfig(chunk_size=CHUNK, inner_lr=0.3, max_norm=None)
    part = InPlaceFeedForward(D, FeedForwardConfig(hidden=I, memory=memory)).double()
    assert part.gate is not None
    assert part.memory.projection is not None
    part.gate.weight.data = wave(torch.sin, I, D, factor=0.5, rate=1.0, shift=0.2)
    part.up.weight.data = wave(torch.cos, I, D, factor=0.5, rate=0.9, shift=0.4)
    part.down.weight.data = wave(torch.sin, D, I, factor=0.5, rate=1.1, shift=0.3)
    part.memory.projection.data = wave(torch.cos, D, D, factor=0.5, rate=0.8, shift=0.5)
    part.memory.taps.data = wave(torch.sin, D, 5, factor=0.5, rate=0.7, shift=0.1)
    part.backend = backend
    return part


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("cuts", [(TOKENS,), (2, 7, TOKENS), tuple(range(1, TOKENS + 1))], ids=str)
def test_the_layer_gives_the_golden_outputs(backend, cuts):
    part, x = layer(backend), wave(torch.sin, TOKENS, D, factor=1.0, rate=0.6, shift=0.2)
    state, outputs = part.init_state(1), []
    for a, b in zip((0, *cuts), cuts):
        y, state = part.parallel(x[None, a:b], state)
        outputs.append(y[0])
    y = torch.cat(outputs)
    for token, want in OUTPUTS.items():
        # Printed with six decimals.
        assert (y[token] - torch.tensor(want, dtype=torch.float64)).abs().max() < 1e-6, f"token {token}: {y[token]}"
