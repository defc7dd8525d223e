"""Model sizes by name, each with the parameter count it must have.

`transformer`, `delta`, `gated-delta`, `ttt-linear`, `ttt-mlp` and `hybrid` share one ladder of widths, depths and
feed-forwards: that of the published TTT models and their Transformer baseline (Sun et al. 2024, arXiv:2407.04620;
repository test-time-training/ttt-lm-jax), 32,000 tokens, tied embeddings. So they can be compared size by size.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from fastweight.configs import check_keys, near_names, require
from fastweight.golf_presets import GOLF, TINY_GOLF
from fastweight.layers import FeedForwardConfig
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.base import MixerConfig
from fastweight.mixers.delta import DeltaConfig
from fastweight.mixers.lact import LactConfig
from fastweight.mixers.ttt import TTTLinearConfig, TTTMLPConfig
from fastweight.model import BlockConfig, ModelConfig

BYTE_VOCABULARY = 257  # 256 bytes and a document separator
WINDOW = 2048


class Preset(NamedTuple):
    """make: builds the config. num_parameters: what a model of it must count."""

    make: Callable[[], ModelConfig]
    num_parameters: int


class Size(NamedTuple):
    """A rung of the ladder: num_layers blocks of width d_model, feed-forwards of width hidden, num_heads heads."""

    num_layers: int
    d_model: int
    num_heads: int
    hidden: int


SIZES = {
    "125m": Size(12, 768, 12, 2048),
    "350m": Size(24, 1024, 16, 2736),
    "760m": Size(24, 1536, 16, 4096),
    "1.3b": Size(24, 2048, 32, 5504),
}


def preset_names() -> list[str]:
    """All names, sorted."""
    return sorted(_PRESETS)


def preset(name: str, **changes: Any) -> ModelConfig:
    """The config called `name`; `changes` replace its fields (vocab_size, tie_embeddings, …) and are checked like it.

    Raises ValueError for an unknown name or field, with near names.
    """
    config = _find(name).make()
    check_keys(f"preset {name!r}: changes", changes, [f.name for f in dataclasses.fields(ModelConfig)])
    # The preset's order belongs to its own blocks and loops, and its loops to that order.
    if "blocks" in changes or "loops" in changes:
        changes = {"order": None} | changes
    if "blocks" in changes or "order" in changes:
        changes = {"loops": None} | changes
    return dataclasses.replace(config, **changes)


def preset_parameters(name: str) -> int:
    """The number of parameters that a model of the unchanged preset `name` has."""
    return _find(name).num_parameters


def _find(name: str) -> Preset:
    require(name in _PRESETS, f"unknown preset {name!r}.{near_names(str(name), _PRESETS)}")
    return _PRESETS[name]


# ---- the ladder -----------------------------------------------------------------------------------------------------


def _ladder(size: Size, mixers: Sequence[MixerConfig], *, pre_conv: int = 0) -> ModelConfig:
    """A model of that size whose blocks take turns with `mixers`."""
    feed_forward = FeedForwardConfig(hidden=size.hidden)
    turns = (mixers[i % len(mixers)] for i in range(size.num_layers))
    blocks = tuple(BlockConfig(mixer=mixer, feed_forward=feed_forward, pre_conv=pre_conv) for mixer in turns)
    return ModelConfig(vocab_size=32000, d_model=size.d_model, blocks=blocks, tie_embeddings=True)


def _attention(size: Size, window: int | None = None) -> AttentionConfig:
    """As in the baseline of the TTT paper: interleaved rotation with base 10,000."""
    return AttentionConfig(num_heads=size.num_heads, window=window, rope_interleaved=True)


def _delta(size: Size) -> DeltaConfig:
    """Heads of 128 without an output gate, as the DeltaNet models of Yang et al. 2024, arXiv:2406.06484."""
    return DeltaConfig(num_heads=size.d_model // 128, head_dim=128, output_gate=False)


def _gated_delta(size: Size) -> DeltaConfig:
    """Keys of 3/4 of the width, values twice that, as Gated DeltaNet (Yang et al. 2025, arXiv:2412.06464)."""
    head_dim = 256 if size.d_model % 1024 == 0 else 192
    heads = size.d_model * 3 // 4 // head_dim
    return DeltaConfig(num_heads=heads, head_dim=head_dim, value_dim=2 * head_dim, gated=True)


def _transformer(size: Size) -> ModelConfig:
    return _ladder(size, [_attention(size)])


def _transformer_window(size: Size) -> ModelConfig:
    return _ladder(size, [_attention(size, WINDOW)])


def _delta_net(size: Size) -> ModelConfig:
    return _ladder(size, [_delta(size)])


def _gated_delta_net(size: Size) -> ModelConfig:
    return _ladder(size, [_gated_delta(size)])


def _ttt_linear(size: Size) -> ModelConfig:
    return _ladder(size, [TTTLinearConfig(num_heads=size.num_heads)], pre_conv=4)


def _ttt_mlp(size: Size) -> ModelConfig:
    return _ladder(size, [TTTMLPConfig(num_heads=size.num_heads)], pre_conv=4)


def _hybrid(size: Size) -> ModelConfig:
    """Gated DeltaNet and sliding windows in turn (the H1 arrangement of arXiv:2412.06464)."""
    return _ladder(size, [_gated_delta(size), _attention(size, WINDOW)])


def _hybrid_full(size: Size) -> ModelConfig:
    """Three Gated DeltaNet blocks, then one that attends to everything."""
    return _ladder(size, [_gated_delta(size)] * 3 + [_attention(size)])


# Family → config of a size, parameter counts in the order of SIZES. The TTT counts are those of the source.
FAMILIES: dict[str, tuple[Callable[[Size], ModelConfig], tuple[int, int, int, int]]] = {
    "transformer": (_transformer, (109_529_856, 335_201_280, 728_704_512, 1_279_887_360)),
    "transformer-window": (_transformer_window, (109_529_856, 335_201_280, 728_704_512, 1_279_887_360)),
    "delta": (_delta_net, (109_724_928, 335_769_600, 729_702_912, 1_281_414_144)),
    "gated-delta": (_gated_delta_net, (123_883_848, 386_061_456, 842_955_552, 1_482_553_632)),
    "ttt-linear": (_ttt_linear, (110_424_144, 337_684_224, 733_608_192, 1_285_639_296)),
    "ttt-mlp": (_ttt_mlp, (114_589_776, 348_792_576, 758_528_256, 1_307_856_000)),
    "hybrid": (_hybrid, (116_706_852, 360_631_368, 785_830_032, 1_381_220_496)),
    "hybrid-full": (_hybrid_full, (120_295_350, 373_346_412, 814_392_792, 1_431_887_064)),
}


# ---- LaCT (Zhang et al. 2025, arXiv:2505.23884; repository a1600012888/LaCT) -----------------------------------------


def _lact(
    d_model: int,
    hidden: int,
    *,
    num_layers: int = 24,
    muon: str = "none",
    momentum: bool = True,
    chunk_size: int = 2048,
) -> ModelConfig:
    # Newton–Schulz as published; in float32 a training step of the 760M model takes twice as long.
    precision = "float32" if muon == "none" else "bfloat16"
    mixer = LactConfig(
        num_heads=24, num_fast_heads=4, chunk_size=chunk_size, window=chunk_size, muon=muon, muon_dtype=precision,
        momentum=momentum, rope_base=1e6, low_rank=32,
    )  # fmt: skip
    block = BlockConfig(mixer=mixer, feed_forward=FeedForwardConfig(hidden=hidden))
    return ModelConfig(vocab_size=32000, d_model=d_model, blocks=(block,) * num_layers)


_lact_760m = partial(_lact, 1536, 4096)
_lact_3b = partial(_lact, 3072, 8192)
# The paper trains 25 layers with chunks and windows of 4096; the published files have 24 and 2048.
_lact_3b_paper = partial(_lact_3b, num_layers=25, chunk_size=4096)

LACT: dict[str, tuple[Callable[[], ModelConfig], int]] = {
    "lact-760m": (partial(_lact_760m, muon="separate"), 797_625_312),
    "lact-760m-muon": (partial(_lact_760m, muon="separate"), 797_625_312),
    "lact-760m-momentum": (_lact_760m, 797_625_312),
    "lact-760m-gd": (partial(_lact_760m, momentum=False), 797_477_760),
    "lact-3b": (partial(_lact_3b, muon="separate"), 2_982_516_192),
    "lact-3b-muon": (partial(_lact_3b, muon="separate"), 2_982_516_192),
    "lact-3b-momentum": (_lact_3b, 2_982_516_192),
    "lact-3b-paper-muon": (partial(_lact_3b_paper, muon="separate"), 3_098_595_572),
    "lact-3b-paper-momentum": (_lact_3b_paper, 3_098_595_572),
}


# ---- tiny models: bytes as tokens, some hundred thousand parameters, for demonstrations and tests --------------------


def _tiny(*mixers: MixerConfig, pre_conv: int = 0, order: tuple[int, ...] | None = None) -> ModelConfig:
    feed_forward = FeedForwardConfig(hidden=256)
    blocks = tuple(BlockConfig(mixer=mixer, feed_forward=feed_forward, pre_conv=pre_conv) for mixer in mixers)
    return ModelConfig(vocab_size=BYTE_VOCABULARY, d_model=96, blocks=blocks, order=order, tie_embeddings=True)


_TINY_ATTENTION = AttentionConfig(num_heads=3)
_TINY_WINDOW = AttentionConfig(num_heads=3, window=64)
_TINY_DELTA = DeltaConfig(num_heads=3, head_dim=32)
_TINY_GATED = DeltaConfig(num_heads=3, head_dim=32, gated=True)
_TINY_LACT = LactConfig(num_heads=3, num_fast_heads=3, chunk_size=64, window=64, muon="separate", low_rank=8)

TINY: dict[str, tuple[Callable[[], ModelConfig], int]] = {
    "attention": (lambda: _tiny(*[_TINY_ATTENTION] * 3), 357_120),
    "window": (lambda: _tiny(*[_TINY_WINDOW] * 3), 357_120),
    "delta": (lambda: _tiny(*[_TINY_DELTA] * 3), 390_048),
    "gated-delta": (lambda: _tiny(*[_TINY_GATED] * 3), 390_930),
    "ttt-linear": (lambda: _tiny(*[TTTLinearConfig(num_heads=3)] * 3, pre_conv=4), 373_305),
    "ttt-mlp": (lambda: _tiny(*[TTTMLPConfig(num_heads=3)] * 3, pre_conv=4), 438_969),
    "lact": (lambda: _tiny(*[_TINY_LACT] * 3), 381_165),
    "hybrid": (lambda: _tiny(_TINY_GATED, _TINY_WINDOW, _TINY_GATED, _TINY_WINDOW), 490_444),
    # Depth recurrence: the two middle blocks are visited twice, each visit with a state of its own.
    "recurrent": (
        lambda: _tiny(_TINY_GATED, _TINY_WINDOW, _TINY_GATED, _TINY_WINDOW, order=(0, 1, 2, 1, 2, 3)),
        490_444,
    ),
}

_LADDER = {
    f"{family}-{size}": Preset(partial(make, shape), count)
    for family, (make, counts) in FAMILIES.items()
    for (size, shape), count in zip(SIZES.items(), counts, strict=True)
}
_TINY = {f"tiny-{name}": entry for name, entry in (TINY | TINY_GOLF).items()}
_PRESETS = _LADDER | {name: Preset(*entry) for name, entry in (LACT | GOLF | _TINY).items()}
