"""The laws: what must hold for every memory layer, written once, as functions of a subject.

Each law raises AssertionError if the subject breaks it. The subject is a mixer with weights moved off their initial
values, so that nothing is hidden by a zero.
"""

from dataclasses import dataclass
from typing import Any

import torch
from tolerances import GRADIENT, OUTPUT, assert_close, relative_error
from torch import Tensor

from fastweight.mixers import Mixer, MixerConfig
from fastweight.ops import dispatch
from fastweight.state import tensors

D_MODEL = 16
LENGTH = 41  # odd, and more than two chunks of every case
CUTS = (1, 14, 15, 33)  # first token alone, one-token piece, chunk borders and middles
DOCUMENTS = (1, 7, 16, 2, 19)
WHOLE = 7 * 16  # whole chunks of every case


@dataclass(frozen=True)
class Subject:
    """A mixer class with a config, to be judged on one backend in one dtype."""

    mixer_class: type[Mixer]
    config: MixerConfig
    backend: str
    dtype: torch.dtype
    device: str = "cpu"

    def build(self) -> Mixer:
        torch.manual_seed(1)
        mixer = self.mixer_class(D_MODEL, self.config)
        mixer.reset_parameters(0.3)
        with torch.no_grad():
            for parameter in mixer.parameters():
                if parameter.requires_grad:  # the others are settings, such as a scheduled weight
                    parameter.add_(0.05 * torch.randn_like(parameter))
        mixer.backend = self.backend
        return mixer.to(self.device, self.dtype)

    def tokens(self, batch: int, length: int = LENGTH, seed: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, length, D_MODEL, generator=generator, dtype=torch.float64)
        return x.to(self.device, self.dtype)


@dataclass
class Run:
    """Outputs, final state and gradients of one way to read a sequence."""

    y: Tensor
    state: Any
    gradients: dict[str, Tensor]


def run(mixer: Mixer, x: Tensor, read) -> Run:
    """Read x with `read(mixer, x) -> (y, state)` and differentiate a fixed random functional of outputs and state."""
    x = x.clone().requires_grad_()
    y, state = read(mixer, x)
    weights = torch.Generator().manual_seed(3)
    loss = _functional(y, weights)
    # A fixed share of the state enters the loss: gradients must flow through what is carried on, too.
    for _, tensor in tensors(state):
        if tensor.is_floating_point() and tensor.requires_grad:
            loss = loss + 0.1 * _functional(tensor, weights)
    parameters = {name: p for name, p in mixer.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, [x, *parameters.values()], allow_unused=True)
    named = {n: g for n, g in zip(["x", *parameters], grads, strict=True) if g is not None}
    return Run(y.detach(), state, named)


def _functional(tensor: Tensor, weights: torch.Generator) -> Tensor:
    w = torch.randn(tensor.shape, generator=weights, dtype=torch.float64).to(tensor.device)
    return (tensor.double() * w).sum()


def whole(mixer: Mixer, x: Tensor) -> tuple[Tensor, Any]:
    return mixer.parallel(x, mixer.init_state(x.shape[0]))


def in_pieces(cuts: tuple[int, ...]):
    def read(mixer: Mixer, x: Tensor) -> tuple[Tensor, Any]:
        state, outputs = mixer.init_state(x.shape[0]), []
        for start, stop in zip((0, *cuts), (*cuts, x.shape[1]), strict=True):
            y, state = mixer.parallel(x[:, start:stop], state)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    return read


def by_token(mixer: Mixer, x: Tensor) -> tuple[Tensor, Any]:
    state, outputs = mixer.init_state(x.shape[0]), []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t : t + 1], state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def leeway(subject: Subject, mixer: Mixer) -> float:
    """How many times the tolerances of bfloat16 two readings by kernels may be apart in layers as narrow as these.

    Each of the two rounds in its own places, so their difference is the square root of two of either's error, and
    errors of few channels scatter. fla keeps what goes from kernel to kernel (w, u, the states between chunks) in 16
    bits: five roundings in a row, 0.4 % of the outputs at 64 channels, up to 1.4 % here. At the widths that it is made
    for it is held to the plain tolerances (tests/ops/test_delta_gpu.py), as LaCT's kernels are
    (tests/ops/test_lact_kernels.py).
    """
    if subject.dtype != torch.bfloat16 or subject.device == "cpu":
        return 1.0
    x = torch.zeros(1, 2, 1, 64, device=subject.device, dtype=subject.dtype)
    named = {op: subject.backend if dispatch.known(op, subject.backend) else "auto" for op in mixer.ops}
    chosen = [dispatch.choose(op, backend, x) for op, backend in named.items()]
    if "fla" in chosen:
        return 3 * 1.5
    return 1.5 if "triton" in chosen else 1.0


def agree(subject: Subject, got: Run, want: Run) -> None:
    wider = leeway(subject, subject.build())
    output, gradient = wider * OUTPUT[subject.dtype], wider * GRADIENT[subject.dtype]
    assert_close(got.y, want.y, output, "outputs")
    found, wanted = dict(tensors(got.state)), dict(tensors(want.state))
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        if value.is_floating_point():
            assert_close(found[name], value, output, f"state {name}")
        else:
            assert torch.equal(found[name], value), f"state {name}: {found[name]} is not {value}"
    assert set(got.gradients) == set(want.gradients)
    largest = max(g.double().square().mean().sqrt().item() for g in want.gradients.values())
    for name, value in want.gradients.items():
        # autograd adds up bfloat16 parameter gradients piece by piece and rounds each time: not the layer's doing.
        if subject.dtype == torch.bfloat16 and name != "x":
            continue
        # A gradient that is itself rounding noise beside the others carries no information.
        if value.double().square().mean().sqrt().item() > 1e-4 * largest:
            # On a GPU sums of float32 run in an order that depends on their length.
            more = 2 if subject.dtype == torch.float32 and subject.device != "cpu" else 1
            assert_close(got.gradients[name], value, more * gradient, f"gradient of {name}")


def split(subject: Subject) -> None:
    """Any cut of a sequence, mid-chunk too, gives the same outputs and final state."""
    mixer, x = subject.build(), subject.tokens(2)
    agree(subject, run(mixer, x, in_pieces(CUTS)), run(mixer, x, whole))


def step(subject: Subject) -> None:
    """Token by token equals all at once."""
    mixer, x = subject.build(), subject.tokens(2)
    agree(subject, run(mixer, x, by_token), run(mixer, x, whole))


def causal(subject: Subject) -> None:
    """Changing the future leaves the past bit-identical, and the past has no gradient from it."""
    mixer, x = subject.build(), subject.tokens(2)
    for t in (1, 13, 16, 30):
        changed = torch.cat([x[:, :t], subject.tokens(2, seed=9)[:, t:]], 1)
        assert torch.equal(whole(mixer, x)[0][:, :t], whole(mixer, changed)[0][:, :t]), f"the past of token {t} moved"
        x.requires_grad_(True)
        (gradient,) = torch.autograd.grad(whole(mixer, x)[0][:, :t].double().square().sum(), x)
        assert (gradient[:, t:] == 0).all(), f"outputs before token {t} have a gradient from it"
        x = x.detach()


def rows(subject: Subject) -> None:
    """Sequences in one batch are independent, also at different positions."""
    mixer, prefixes, x = subject.build(), (3, 16, 22), subject.tokens(3)
    ends = torch.tensor([0, *prefixes]).cumsum(0).to(subject.device)
    history = [subject.tokens(1, length, seed=20 + n) for n, length in enumerate(prefixes)]

    def together(mixer: Mixer, x: Tensor) -> tuple[Tensor, Any]:
        _, state = mixer.parallel(torch.cat(history, 1), mixer.init_state(3), cu_seqlens=ends)
        head, state = mixer.parallel(x[:, :1], state)  # one token for rows at different positions: the decode path
        tail, state = mixer.parallel(x[:, 1:], state)
        return torch.cat([head, tail], 1), state

    def alone(mixer: Mixer, x: Tensor) -> tuple[Tensor, Any]:
        outputs, states = [], []
        for n, before in enumerate(history):
            y, state = whole(mixer, torch.cat([before, x[n : n + 1]], 1))
            outputs.append(y[:, before.shape[1] :])
            states.append(state)
        return torch.cat(outputs), _concatenate(states)

    agree(subject, run(mixer, x, together), run(mixer, x, alone))


def packed(subject: Subject) -> None:
    """Packed documents equal the documents run alone, and continue so; nothing leaks over a boundary."""
    mixer, total = subject.build(), sum(DOCUMENTS)
    ends = torch.tensor([0, *DOCUMENTS]).cumsum(0).to(subject.device)
    x = subject.tokens(1, 2 * total)

    def together(mixer: Mixer, x: Tensor) -> tuple[Tensor, Any]:
        first, state = mixer.parallel(x[:, :total], mixer.init_state(len(DOCUMENTS)), cu_seqlens=ends)
        second, state = mixer.parallel(x[:, total:], state, cu_seqlens=ends)
        return torch.cat([first, second], 1), state

    def alone(mixer: Mixer, x: Tensor) -> tuple[Tensor, Any]:
        first, second, states = [], [], []
        pieces = zip(x[:, :total].split(DOCUMENTS, 1), x[:, total:].split(DOCUMENTS, 1), strict=True)
        for a, b in pieces:
            y, state = whole(mixer, torch.cat([a, b], 1))
            first.append(y[:, : a.shape[1]])
            second.append(y[:, a.shape[1] :])
            states.append(state)
        return torch.cat(first + second, 1), _concatenate(states)

    agree(subject, run(mixer, x, together), run(mixer, x, alone))
    changed = torch.cat([subject.tokens(1, 8, seed=9), x[:, 8:total]], 1)  # documents 0 and 1
    before, _ = mixer.parallel(x[:, :total], mixer.init_state(len(DOCUMENTS)), cu_seqlens=ends)
    after, _ = mixer.parallel(changed, mixer.init_state(len(DOCUMENTS)), cu_seqlens=ends)
    assert torch.equal(before[:, 8:], after[:, 8:]), "another document changed what these documents read"
    equal = subject.tokens(3, WHOLE)
    packed, _ = mixer.parallel(
        equal.flatten(0, 1)[None], mixer.init_state(3), cu_seqlens=WHOLE * torch.arange(4, device=subject.device)
    )
    wanted = whole(mixer, equal)[0].flatten(0, 1)[None]
    assert_close(packed, wanted, leeway(subject, mixer) * OUTPUT[subject.dtype], "documents of equal length")


def frozen(subject: Subject) -> None:
    """With learning off the layer is static: a past beyond every window and convolution changes nothing at all."""
    mixer, x = subject.build(), subject.tokens(2, 64)
    changed = torch.cat([subject.tokens(2, 16, seed=9), x[:, 16:]], 1)
    if not mixer.learns:
        learning = whole(mixer, x)[0]
        mixer.learning = False
        assert torch.equal(whole(mixer, x)[0], learning), "nothing learns here, yet freezing changed outputs"
        return
    mixer.learning = False
    for read in (whole, by_token, in_pieces(CUTS)):
        assert torch.equal(read(mixer, x)[0][:, 48:], read(mixer, changed)[0][:, 48:]), "a frozen memory remembered"


def backends(subject: Subject) -> None:
    """Every backend agrees with naive."""
    mixer, x = subject.build(), subject.tokens(2)
    got = run(mixer, x, whole)
    mixer.backend = "naive"
    agree(subject, got, run(mixer, x, whole))


def far(subject: Subject) -> None:
    """What lies beyond any attention window still changes the output, in decoding as in parallel."""
    mixer, x = subject.build(), subject.tokens(2, 64)
    changed = torch.cat([subject.tokens(2, 4, seed=9), x[:, 4:]], 1)
    for read in (whole, by_token):
        moved = relative_error(read(mixer, changed)[0][:, -1], read(mixer, x)[0][:, -1])
        # Forgetting is allowed, silence is not: far above float64 rounding, far below any use.
        assert moved > 1e-11, f"the last output moved by {moved:.1e} only when the first tokens changed"


def _concatenate(states: list[Any]) -> Any:
    """One state of N sequences from N states of one; caches of different length are aligned at their newest entry."""
    from fastweight.state import zip_tensors

    def join(*parts: Tensor) -> Tensor:
        if parts[0].dim() > 1:
            longest = max(p.shape[1] for p in parts)
            pad = lambda p: p.new_zeros(1, longest - p.shape[1], *p.shape[2:])  # noqa: E731
            parts = tuple(torch.cat([pad(p), p], 1) for p in parts)
        return torch.cat(parts)

    return zip_tensors(join, *states)


LAWS = {law.__name__: law for law in (split, step, causal, rows, packed, frozen, backends, far)}
