"""Random inputs of the LaCT op, for its tests: one problem per rule, and comparisons with `naive`."""

import torch
from tolerances import assert_close, assert_trees_close
from torch import Tensor

from fastweight.ops.lact import LactPending, LactState, Rule, init_lact, lact
from fastweight.ops.lact.grid import Memory, Tokens
from fastweight.ops.lact.layout import lay_out, pack, tokens_on_grid
from fastweight.ops.lact.unit import Settings
from fastweight.state import tensors, zip_tensors

HEADS, DIM, HIDDEN, CHUNK = 2, 5, 6, 16
# Muon amplifies small singular values 500 times; chunks of three times the width keep them away from zero.
RULES = {
    "gradient descent": {},
    "momentum": {"momentum": True},
    "pre-norm": {"momentum": True, "prenorm": True},
    "muon": {"muon": "separate"},
    "joint muon": {"muon": "joint", "momentum": True, "prenorm": True},
    "only w1": {"update": "w1", "momentum": True},
    "only w1, muon": {"update": "w1", "muon": "separate"},
    "rates per channel": {"lr_dim": DIM, "hidden": DIM},
}


class Problem:
    """Random tokens and initial weights for one rule; `read` runs the op over a part of the tokens."""

    def __init__(self, rule: dict, length: int, batch: int = 2, *, dtype=torch.float64, seed: int = 0, scale=1.0):
        rule = dict(rule)
        self.momentum, self.lr_dim = rule.pop("momentum", False), rule.pop("lr_dim", 1)
        hidden, self.rule = rule.pop("hidden", HIDDEN), {"chunk_size": CHUNK, **rule}
        random = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        tokens = (batch, length, HEADS)
        self.x = {name: draw(*tokens, DIM) for name in "qkv"}
        self.x["lr"] = 0.05 * scale * draw(*tokens, 3, self.lr_dim).exp()
        if self.momentum:
            self.x["momentum"] = draw(*tokens).sigmoid()
        self.x |= {"w0": draw(HEADS, hidden, DIM), "w1": draw(HEADS, DIM, hidden), "w2": draw(HEADS, hidden, DIM)}
        self.x = {name: t.to(dtype).requires_grad_() for name, t in self.x.items()}

    def init(self, n: int, token_dtype=None) -> LactState:
        w = [self.x[f"w{j}"].to(torch.promote_types(self.x["w0"].dtype, torch.float32)) for j in range(3)]
        settings = {key: self.rule[key] for key in ("chunk_size", "prenorm", "update") if key in self.rule}
        return init_lact(*w, n, momentum=self.momentum, lr_dim=self.lr_dim, token_dtype=token_dtype, **settings)

    def read(self, state: LactState, part=slice(None), **settings) -> tuple[Tensor, LactState]:
        q, k, v, lr = (self.x[name][:, part] for name in ("q", "k", "v", "lr"))
        b = self.x["momentum"][:, part] if self.momentum else None
        return lact(q, k, v, lr, b, state, **self.rule | settings)

    def gradients(self, y: Tensor, state: LactState) -> dict[str, Tensor]:
        random, loss = torch.Generator(), 0
        for i, t in enumerate([y, *(t for _, t in tensors(state))]):
            random.manual_seed(i)
            if not t.requires_grad:  # a part of the state that nothing has reached yet
                continue
            loss = loss + (t * torch.randn(t.shape, generator=random, dtype=torch.float64).to(t)).sum()
        found = torch.autograd.grad(loss, list(self.x.values()), allow_unused=True, retain_graph=True)
        return {name: g for name, g in zip(self.x, found) if g is not None}


def compare(problem: Problem, start: LactState, tolerance: float, gradient: float, **settings) -> None:
    want_y, want_state = problem.read(start, backend="naive", **settings)
    got_y, got_state = problem.read(start, **{"backend": "chunked", **settings})
    assert_close(got_y, want_y, tolerance, "outputs")
    assert_trees_close(got_state, want_state, tolerance)
    want = problem.gradients(want_y, want_state)
    for name, g in problem.gradients(got_y, got_state).items():
        assert_close(g, want[name], gradient, f"gradient of {name}")


def started(problem: Problem, phases: tuple[int, ...]) -> LactState:
    """Rows that have read `phases` tokens each, differentiable with respect to the initial weights."""
    states = []
    for n, phase in enumerate(phases):
        other = Problem(
            problem.rule | {"momentum": problem.momentum, "lr_dim": problem.lr_dim}, phase or 1, 1, seed=50 + n
        )
        other.x = {key: t.to(problem.x["q"].dtype) for key, t in other.x.items()}
        other.x |= {key: problem.x[key] for key in ("w0", "w1", "w2")}
        states.append(other.read(other.init(1), backend="naive")[1] if phase else other.init(1))
    return zip_tensors(lambda *t: torch.cat(t), *states)


def call_of(name: str, seed: int) -> tuple[Tokens, Memory, Settings]:
    """What the unit gets of two sequences of three whole chunks each."""
    problem = Problem(RULES[name], 3 * CHUNK, dtype=torch.float32, seed=seed)
    state, x = problem.init(2), {key: t.detach() for key, t in problem.x.items()}
    layout = lay_out(state.position, [3 * CHUNK] * 2, [0, 0], CHUNK)
    lr = x["lr"] if x["lr"].dim() == 5 else x["lr"][..., None]
    grid = tokens_on_grid(LactPending(x["k"], x["v"], lr, x.get("momentum")), state.pending, layout)
    memory = Memory(*(None if t is None else t.detach() for t in pack(state.memory, layout)))
    rule = Rule(**problem.rule)
    settings = Settings([], rule.muon, rule.muon_dtype, rule.prenorm, rule.update, True, False, save=True)
    return Tokens(layout.gather(x["q"], state.pending.k), *grid, layout.due), memory, settings
