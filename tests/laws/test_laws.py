"""Every law, over every registered mixer, on every backend, in every dtype; and proof that the laws can fail."""

from dataclasses import dataclass
from typing import NamedTuple

import laws.laws as book
import pytest
import torch
from laws.cases import CASES, backends_of, why_not
from laws.laws import LAWS, Subject
from torch import Tensor, nn

from fastweight.mixers import Mixer, MixerConfig, mixer_class, mixer_kinds
from fastweight.state import register_state

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


NAIVE_IS_WIDE = {("naive", "float32"), ("naive", "bfloat16")}


def subjects(device):
    for law in LAWS:
        for case, config in CASES.items():
            if law == "far" and not mixer_class(config.kind)(book.D_MODEL, config).has_memory:
                continue
            for dtype in DTYPES:
                # Bit-exactness does not depend on precision, and reach is told best with many digits.
                if dtype != {"causal": "float32", "frozen": "float32", "far": "float64"}.get(law, dtype):
                    continue
                for backend in backends_of(config, device, DTYPES[dtype]):
                    if (law == "backends" and backend in ("naive", "auto")) or (backend, dtype) in NAIVE_IS_WIDE:
                        continue
                    if (backend, dtype) == ("triton", "bfloat16") and getattr(config, "muon", "none") != "none":
                        # Rounded products meet Newton–Schulz's slope: held to their tolerance at the widths that the op
                        # states (tests/ops/test_lact_kernels.py), which no layer as narrow as this one has.
                        continue
                    # With `--dist loadgroup` one process compiles a case's kernels, not each of them.
                    group = pytest.mark.xdist_group(case)
                    yield pytest.param(law, config, backend, dtype, id=f"{law}-{case}-{backend}-{dtype}", marks=group)


def pytest_generate_tests(metafunc):
    if metafunc.function is test_the_law_holds:
        device = metafunc.config.getoption("--device")
        metafunc.parametrize(("law", "config", "backend", "dtype"), list(subjects(device)))


def test_the_law_holds(law, config, backend, dtype, request):
    device = request.config.getoption("--device")
    if refusal := why_not(config, backend, device, DTYPES[dtype]):
        pytest.skip(refusal)
    LAWS[law](Subject(mixer_class(config.kind), config, backend, DTYPES[dtype], device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("case", "kernel"),
    [("lact-momentum", "triton"), ("ttt_linear-transformer", "triton"), ("ttt_mlp-transformer_mlp", "triton"),
     ("delta-gated", "fla"), ("liza-window", "fla"), ("attention-window", "varlen"),
     ("attention-window", "flex"), ("attention-sinks", "flex"), ("attention-capped", "flex")],
)  # fmt: skip
def test_kernels_are_among_the_backends_that_the_laws_try_on_a_gpu(case, kernel):
    assert kernel in backends_of(CASES[case], "cuda", torch.bfloat16)
    assert why_not(CASES[case], kernel, "cuda", torch.bfloat16) is None


def test_every_registered_mixer_is_a_subject():
    assert sorted({config.kind for config in CASES.values()}) == mixer_kinds()


@dataclass(frozen=True, kw_only=True)
class NoConfig(MixerConfig):
    kind = "wrong"


@register_state
class MeanState(NamedTuple):
    total: Tensor
    position: Tensor


class Peeking(Mixer):
    """Deliberately wrong: every token sees the next one."""

    Config = NoConfig

    def __init__(self, d_model, config):
        super().__init__(d_model, config)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def init_state(self, num_sequences):
        zeros = torch.zeros(num_sequences, self.d_model, dtype=self.out.weight.dtype)
        return MeanState(zeros, torch.zeros(num_sequences, dtype=torch.int64))

    def parallel(self, x, state, *, cu_seqlens=None):
        ahead = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)
        return self.out(x + ahead), MeanState(state.total + x.sum(1), state.position + x.shape[1])


class Forgetful(Peeking):
    """Deliberately wrong: tokens of an unfinished chunk of four are dropped when the call ends."""

    def parallel(self, x, state, *, cu_seqlens=None):
        outputs, total = [], state.total
        for chunk in x.split(4, 1):
            outputs.append(self.out(chunk + total[:, None]))
            if chunk.shape[1] == 4:
                total = total + chunk.sum(1)
        return torch.cat(outputs, 1), MeanState(total, state.position + x.shape[1])


class Leaking(Peeking):
    """Deliberately wrong: a running sum that ignores document boundaries."""

    def parallel(self, x, state, *, cu_seqlens=None):
        total = state.total[:1, None] if cu_seqlens is not None else state.total[:, None]
        y = self.out(total + x.cumsum(1))
        count = x.shape[1] if cu_seqlens is None else cu_seqlens.diff()
        return y, MeanState(state.total + x.sum(1), state.position + count)


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (Peeking, "causal"),
        (Peeking, "split"),
        (Peeking, "step"),
        (Forgetful, "split"),
        (Forgetful, "step"),
        (Leaking, "packed"),
        (Leaking, "rows"),
        (Leaking, "frozen"),
        (Peeking, "far"),
    ],
)
def test_a_wrong_mixer_breaks_the_law(wrong, law):
    with pytest.raises(AssertionError):
        LAWS[law](Subject(wrong, NoConfig(), "auto", torch.float64))
