"""What a model is made of: the configs of blocks and of the whole, their JSON form, their signature."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from fastweight.configs import check_keys, check_types, require, to_json
from fastweight.layers import FeedForwardConfig, check_norm, feed_forward_config
from fastweight.mixers.base import MixerConfig, mixer_config


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One block: mixer, then feed-forward, each with its norms and a residual.

    residual: "sequential" (x += mixer; x += feed-forward) or "parallel" (both read the same x; GPT-J).
    norm_position: of mixer and feed-forward f: "pre" x + f(norm(x)), "post" x + norm(f(x)) (OLMo 2, arXiv:2501.00656),
    "both" x + norm(f(norm(x))) (Gemma 2, arXiv:2408.00118).
    pre_conv: width of a causal convolution with its own norm and residual before the mixer, 0 for none.
    """

    mixer: MixerConfig
    feed_forward: FeedForwardConfig | None = None
    residual: str = "sequential"
    norm_position: str = "pre"
    pre_conv: int = 0

    def __post_init__(self) -> None:
        check_types(self, "block")
        require(
            self.residual in ("sequential", "parallel"),
            f'block: residual must be "sequential" or "parallel", got {self.residual!r}.',
        )
        require(
            self.norm_position in ("pre", "post", "both"),
            f'block: norm_position must be "pre", "post" or "both", got {self.norm_position!r}.',
        )
        require(self.pre_conv == 0 or self.pre_conv >= 2, f"block: pre_conv must be 0 or >= 2, got {self.pre_conv}.")

    def to_dict(self) -> dict[str, Any]:
        feed_forward = None if self.feed_forward is None else asdict(self.feed_forward)
        return {
            "mixer": self.mixer.to_dict(),
            "feed_forward": feed_forward,
            "residual": self.residual,
            "norm_position": self.norm_position,
            "pre_conv": self.pre_conv,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "BlockConfig":
        require(isinstance(data, dict), f"block: expected an object with keys, got {type(data).__name__}.")
        check_keys("block", data, ["mixer", "feed_forward", "residual", "norm_position", "pre_conv"], ["mixer"])
        feed_forward = data.get("feed_forward")
        rest = {key: data[key] for key in ("residual", "norm_position", "pre_conv") if key in data}
        return BlockConfig(
            mixer=mixer_config(data["mixer"]),
            feed_forward=None if feed_forward is None else feed_forward_config(feed_forward),
            **rest,
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model. `order` lists the blocks in the order of their visits; repeats give depth recurrence.

    norm: of the blocks and before the head, "rms", "rms-offset" or "layer". embedding_scale: factor on the embeddings.
    max_positions: size of a learned position embedding, which is then the longest sequence; 0 for none. logit_softcap:
    c of c·tanh(logits / c). head_bias: of an untied head.
    """

    vocab_size: int
    d_model: int
    blocks: tuple[BlockConfig, ...]
    order: tuple[int, ...] | None = None
    norm: str = "rms"
    norm_eps: float = 1e-6
    embedding_scale: float | None = None
    max_positions: int = 0
    tie_embeddings: bool = False
    head_bias: bool = False
    logit_softcap: float | None = None
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("blocks", "order"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_types(self, "model")
        require(self.vocab_size > 0, f"model: vocab_size must be positive, got {self.vocab_size}.")
        require(self.d_model > 0, f"model: d_model must be positive, got {self.d_model}.")
        check_norm("model", self.norm)
        require(self.max_positions >= 0, f"model: max_positions must not be negative, got {self.max_positions}.")
        require(not (self.head_bias and self.tie_embeddings), "model: tied embeddings have no head_bias.")
        require(len(self.blocks) > 0, "model: blocks is empty; give at least one BlockConfig.")
        if self.order is None:
            object.__setattr__(self, "order", tuple(range(len(self.blocks))))
        assert self.order is not None
        bad = [i for i in self.order if not 0 <= i < len(self.blocks)]
        require(not bad, f"model: order names block(s) {bad}, but there are {len(self.blocks)} blocks.")
        unused = sorted(set(range(len(self.blocks))) - set(self.order))
        require(not unused, f"model: order never visits block(s) {unused}.")
        require(self.logit_softcap is None or self.logit_softcap > 0, "model: logit_softcap must be positive or None.")

    @property
    def visits(self) -> tuple[int, ...]:
        """`order`, as numbers of blocks."""
        assert self.order is not None
        return self.order

    @property
    def signature(self) -> str:
        """A short fingerprint; states carry it, so that a state of another model is refused."""
        return fingerprint(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        data = {key: getattr(self, key) for key in self.__dataclass_fields__ if key not in ("blocks", "order")}
        return data | {"order": list(self.visits), "blocks": [block.to_dict() for block in self.blocks]}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "ModelConfig":
        require(isinstance(data, dict), f"model config: expected an object, got {type(data).__name__}.")
        check_keys("model", data, ModelConfig.__dataclass_fields__, ["vocab_size", "d_model", "blocks"])
        require(isinstance(data["blocks"], list), f"model: blocks must be a list, got {data['blocks']!r}.")
        blocks, order = tuple(BlockConfig.from_dict(block) for block in data["blocks"]), data.get("order")
        return ModelConfig(**(data | {"blocks": blocks, "order": tuple(order) if isinstance(order, list) else order}))


def fingerprint(config: dict[str, Any]) -> str:
    """The signature of a config in its JSON form."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]
