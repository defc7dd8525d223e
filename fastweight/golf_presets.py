"""The models of the Parameter Golf contest as configurations of the one Model (repository openai/parameter-golf).

The record's count agrees with the published 35.94 M; the baseline's is what its published sizes give. Of the 3 × 8
model only sizes of whole blocks are known (6.29 M parameters per block and as many for the embedding, 24 visits): 12
heads over 4 key heads of 64 and a feed-forward of four times the width give exactly that; its vectors are taken to be
those of the baseline.

Attention reaches back as many tokens as the windows of their recipes hold. Training and windows do not notice; a whole
document is then read with keys at distances that were trained, and with a state of bounded size.
"""

from collections.abc import Callable
from typing import Any

from fastweight.layers import FeedForwardConfig
from fastweight.mixers.attention import AttentionConfig
from fastweight.model import BlockConfig, ModelConfig


def golf_attention(**changes: Any) -> AttentionConfig:
    """Normalised queries and keys without weights, a gain per head."""
    return AttentionConfig(qk_norm="head", norm="rms-unit", **changes)


def golf_block(mixer: AttentionConfig, kind: str, hidden: int, **changes: Any) -> BlockConfig:
    """Mixing with the embedding and a weight per channel on what mixer and feed-forward add."""
    feed_forward = FeedForwardConfig(kind=kind, hidden=hidden)
    return BlockConfig(mixer=mixer, feed_forward=feed_forward, x0_mix=True, residual_factors="channel", **changes)


def golf_model(blocks: tuple[BlockConfig, ...], **changes: Any) -> ModelConfig:
    """Norms without weights, also of the embedding; tied; logits capped at 30; output projections start at zero."""
    settings: dict[str, Any] = {
        "blocks": blocks, "norm": "rms-unit", "embedding_norm": True, "tie_embeddings": True, "logit_softcap": 30.0,
        "embedding_std": 0.005, "in_init": "orthogonal", "out_init": "zero",
    }  # fmt: skip
    return ModelConfig(**(settings | changes))


def baseline() -> ModelConfig:
    """The contest's baseline: 9 layers, added skips."""
    mixer = golf_attention(num_heads=8, num_kv_heads=4, qk_gain=1.5, window=1024)
    blocks = (golf_block(mixer, "relu2", 1024),) * 9
    return golf_model(blocks, vocab_size=1024, d_model=512, skips="add")


def record(
    *, d_model: int = 512, heads: int = 8, layers: int = 11, loops: tuple[int, int, int] = (3, 6, 3),
    first_parallel: int = 7, vocab_size: int = 8192, gain: float = 5.25, window: int | None = 2048,
) -> ModelConfig:  # fmt: skip
    """Shaped as the records from April on: blocks 3 to 5 three times, late blocks parallel, gated skips, XSA."""
    head_dim = d_model // heads
    mixer = golf_attention(
        num_heads=heads,
        num_kv_heads=heads // 2,
        qk_gain=gain,
        rotary_dim=head_dim // 4,
        exclude_self=True,
        window=window,
    )
    blocks = tuple(
        golf_block(mixer, "leaky-relu2", 4 * d_model, residual="parallel" if i >= first_parallel else "sequential")
        for i in range(layers)
    )
    return golf_model(
        blocks, vocab_size=vocab_size, d_model=d_model, loops=loops, depth_scaled_norms=True, skips="gated"
    )


def recurrent(
    *,
    d_model: int = 768,
    heads: int = 12,
    kv_heads: int = 4,
    loops: int = 8,
    vocab_size: int = 8192,
    window: int | None = 2048,
) -> ModelConfig:
    """Three parallel blocks, visited one after the other `loops` times over, and nothing else.

    Unlike the audited submission its output projections start at zero: without that, shared blocks add up coherently.
    """
    mixer = golf_attention(num_heads=heads, num_kv_heads=kv_heads, qk_gain=5.25, window=window)
    blocks = (golf_block(mixer, "relu2", 4 * d_model, residual="parallel"),) * 3
    return golf_model(blocks, vocab_size=vocab_size, d_model=d_model, loops=(0, 3, loops))


def _tiny_record() -> ModelConfig:
    return record(
        d_model=96, heads=4, layers=5, loops=(1, 3, 2), first_parallel=3, vocab_size=257, gain=5.0, window=None
    )


def _tiny_looped() -> ModelConfig:
    return recurrent(d_model=96, heads=4, kv_heads=2, loops=4, vocab_size=257, window=None)


GOLF: dict[str, tuple[Callable[[], ModelConfig], int]] = {
    "golf-baseline-9x512": (baseline, 17_059_912),
    "golf-record-11x512": (record, 35_944_536),
    "recurrent-3x8": (recurrent, 25_175_076),
}
# By their short names; the presets are called "tiny-…".
TINY_GOLF: dict[str, tuple[Callable[[], ModelConfig], int]] = {
    "record": (_tiny_record, 534_068),
    "looped": (_tiny_looped, 329_964),
}
