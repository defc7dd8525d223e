"""The memory of a LiZA layer against a loop over its recurrence, and for every size of block."""

import math

import pytest
import torch
from mixers.liza_cases import T, build, tokens
from tolerances import assert_close, assert_trees_close

from fastweight.mixers.liza import Liza, LizaConfig
from fastweight.ops.delta import chunked


def phi(config: LizaConfig, z: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """The feature map of one head and one token."""
    if config.feature_map == "silu":
        z = z / (1 + torch.exp(-z))
    if config.feature_map == "softmax":
        z = torch.exp(z) / torch.exp(z).sum()
    if config.feature_map == "hedgehog":
        z = torch.cat([torch.exp(weight @ z), torch.exp(-weight @ z)])
    return z / z.square().sum().sqrt()


def turned(z: torch.Tensor, angle: float) -> torch.Tensor:
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=z.dtype)
    return torch.block_diag(*[turn] * (len(z) // 2)) @ z


def further(config: LizaConfig, history: list[torch.Tensor], j: int) -> torch.Tensor:
    """Step j of the token that `history` ends with: what it writes beside its own pair."""
    past = [history[-1 - i] if i < len(history) else torch.zeros_like(history[-1]) for i in range(j + 1)]
    if j == 0:
        return past[0]
    while len(past) > 1:  # the backward difference, one order at a time
        past = [(a - b) / 2 for a, b in zip(past, past[1:])]
    turn = turned(history[-1], 2 * math.pi * j / config.order)
    return {"derivative": past[0], "rotative": turn, "combined": (past[0] + turn) / 2}[config.trick]


def by_loop(mixer: Liza, x: torch.Tensor, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear branch of x [T, D] from the recurrence alone: heads [T, Hq, D], and the last memory [Hkv, F, D]."""
    c, memory = mixer.config, mixer.memory
    q, k, v = (z[0] for z in mixer.project_unrotated(x[None]))
    group = q.shape[1] // k.shape[1]
    heads = [[None] * q.shape[1] for _ in x]
    last = []
    for h in range(k.shape[1]):
        S, keys, values = first[h], [], []
        for t in range(len(x)):
            keys.append(phi(c, k[t, h], None if memory.k_map is None else memory.k_map[h]))
            values.append(v[t, h])
            if memory.decay is not None:
                S = S / (1 + torch.exp(x[t] @ memory.decay.weight[h] + memory.decay.bias[h]))
            for m, j in enumerate(reversed(range(c.order))):
                row = m * k.shape[1] + h
                beta = 1 / (1 + torch.exp(-(x[t] @ memory.beta.weight[row] + memory.beta.bias[row])))
                key, value = further(c, keys, j), further(c, values, j)
                S = S + beta * torch.outer(key, value - S.T @ key)
            for g in range(h * group, (h + 1) * group):
                y = S.T @ phi(c, q[t, g], None if memory.q_map is None else memory.q_map[g])
                heads[t][g] = y if memory.gain is None else y / (y.square().mean() + 1e-6).sqrt() * memory.gain[g]
        last.append(S)
    return torch.stack([torch.stack(row) for row in heads]), torch.stack(last)


OPERATORS = {
    "plain": {"gated": False},
    "gated": {},
    "softmax": {"feature_map": "softmax", "output_norm": "rms"},
    "hedgehog": {"feature_map": "hedgehog"},
    "order2": {"order": 2, "feature_map": "identity"},
    "order2_rotative": {"order": 2, "trick": "rotative"},
    "order3_combined": {"order": 3, "trick": "combined"},
    "order3_hedgehog": {"order": 3, "feature_map": "hedgehog", "feature_dim": 6},
}


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("case", OPERATORS)
def test_p2_the_memory_equals_a_loop_over_the_recurrence_in_values_and_gradients(case, backend):
    mixer = build(LizaConfig(num_heads=4, num_kv_heads=2, mag_weight=1.0, **OPERATORS[case]))
    mixer.backend = backend
    x, state = tokens(19, 1), mixer.init_state(1)
    first = torch.randn(state.memory.matrix.memory.shape, generator=torch.Generator().manual_seed(6)).double()
    start = state._replace(memory=state.memory._replace(matrix=state.memory.matrix._replace(memory=first)))
    inputs = [x.requires_grad_(), first.requires_grad_(), *(p for p in mixer.parameters() if p.requires_grad)]

    def weighed(y, memory):
        w = torch.Generator().manual_seed(7)
        return sum((z * torch.randn(z.shape, generator=w).double()).sum() for z in (y, memory))

    q, k, v = mixer.project_unrotated(x)
    y, after = mixer.memory(x, q, k, v, start.memory, None, backend=backend, learning=True)
    want, memory = by_loop(mixer, x[0], first[0])
    assert_close(y[0], want, 1e-9)
    assert_close(after.matrix.memory[0], memory, 1e-9)
    got = torch.autograd.grad(weighed(y, after.matrix.memory), inputs, allow_unused=True)
    loop = torch.autograd.grad(weighed(want[None], memory[None]), inputs, allow_unused=True)
    for a, b in zip(got, loop):
        assert (a is None) == (b is None)
        if b is not None:
            assert_close(a, b, 1e-9)


@pytest.mark.parametrize("size", [1, 7, 16, 64, T, 200])
@pytest.mark.parametrize("case", ["plain", "gated", "order2"])
def test_p3_the_size_of_the_blocks_that_are_solved_together_changes_nothing(case, size, monkeypatch):
    mixer = build(LizaConfig(num_heads=4, num_kv_heads=2, mag_weight=1.0, **OPERATORS[case]), torch.float32)
    x = tokens(dtype=torch.float32)
    mixer.backend = "naive"
    want, state = mixer.parallel(x, mixer.init_state(2))
    mixer.backend = "chunked"
    monkeypatch.setattr(chunked, "BLOCK", size)
    y, after = mixer.parallel(x, mixer.init_state(2))
    assert_close(y, want, 1e-5)
    assert_trees_close(after, state, 1e-5)
