"""What a model is made of: the configs of blocks and of the whole, their JSON form, their signature."""

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from fastweight.configs import check_keys, check_types, json_fields, later, near_names, require, to_json
from fastweight.layers import FeedForwardConfig, check_norm, feed_forward_config
from fastweight.mixers.base import MixerConfig, mixer_config
from fastweight.residual import FACTORS, RESIDUALS, SKIPS

IN_INITS, OUT_INITS = ("normal", "orthogonal"), ("normal", "zero")

MOST_VISITS = 1 << 16  # of the blocks of a core


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One block: mixer, then feed-forward, each with its norms and a residual.

    residual: "sequential" (x += mixer; x += feed-forward), "parallel" (both read the same x; GPT-J) or "lanes": the
    stream parts into two of which mixer and feed-forward each read one and both write to both, with learned weights
    that are 1 at first ("parallel" then); lanes last to the end of the order, where their mean goes on.
    norm_position: of mixer and feed-forward f: "pre" x + f(norm(x)), "post" x + norm(f(x)) (OLMo 2, arXiv:2501.00656),
    "both" x + norm(f(norm(x))) (Gemma 2, arXiv:2408.00118).
    pre_conv: width of a causal convolution with its own norm and residual before the mixer, 0 for none.
    x0_mix: the block reads a·x + b·x0 per channel, x0 being what the first block reads; learned from a = 1, b = 0.
    residual_factors: learned weights on what mixer and feed-forward add: "none", "scalar" or "channel"; 1 at first.
    per_visit: a, b and those weights are each visit's own, else all visits of the block share them.
    """

    mixer: MixerConfig
    feed_forward: FeedForwardConfig | None = None
    residual: str = "sequential"
    norm_position: str = "pre"
    pre_conv: int = 0
    x0_mix: bool = False
    residual_factors: str = "none"
    per_visit: bool = False

    def __post_init__(self) -> None:
        check_types(self, "block")
        require(
            self.residual in RESIDUALS,
            f'block: residual must be "sequential", "parallel" or "lanes", got {self.residual!r}.',
        )
        require(
            self.residual != "lanes" or (self.feed_forward is not None and not self.pre_conv),
            'block: residual "lanes" needs a feed-forward, which reads the second lane, and no pre_conv.',
        )
        require(
            self.norm_position in ("pre", "post", "both"),
            f'block: norm_position must be "pre", "post" or "both", got {self.norm_position!r}.',
        )
        require(self.pre_conv == 0 or self.pre_conv >= 2, f"block: pre_conv must be 0 or >= 2, got {self.pre_conv}.")
        require(
            self.residual_factors in FACTORS,
            f"block: unknown residual_factors {self.residual_factors!r}.{near_names(self.residual_factors, FACTORS)}",
        )
        require(
            not self.per_visit or self.has_weights,
            'block: per_visit needs x0_mix, residual_factors or residual "lanes"; there is nothing that a visit could '
            "own.",
        )

    @property
    def has_weights(self) -> bool:
        """Whether the residual stream of this block has weights."""
        return self.x0_mix or self.residual_factors != "none" or self.residual == "lanes"

    def to_dict(self) -> dict[str, Any]:
        feed_forward = None if self.feed_forward is None else asdict(self.feed_forward)
        rest = {key: getattr(self, key) for key in self.__dataclass_fields__ if key not in ("mixer", "feed_forward")}
        return {"mixer": self.mixer.to_dict(), "feed_forward": feed_forward, **rest}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "BlockConfig":
        require(isinstance(data, dict), f"block: expected an object with keys, got {type(data).__name__}.")
        check_keys("block", data, BlockConfig.__dataclass_fields__, ["mixer"])
        feed_forward = data.get("feed_forward")
        rest = {key: value for key, value in data.items() if key not in ("mixer", "feed_forward")}
        return BlockConfig(
            mixer=mixer_config(data["mixer"]),
            feed_forward=None if feed_forward is None else feed_forward_config(feed_forward),
            **rest,
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model. `order` lists the blocks in the order of their visits; repeats give depth recurrence.

    loops: (start, stop, count), depth recurrence in short: blocks start to stop - 1 are the core, visited count times
    over; the blocks before and after it once. `order` is then derived, and may be given only if it is the same.
    norm: of the blocks and before the head, "rms", "rms-offset", "rms-unit" (no weights) or "layer".
    depth_scaled_norms: the norms before mixer and feed-forward of block l are multiplied by 1/sqrt(l + 1).
    embedding_scale: factor on the embeddings. embedding_norm: they are then normalised, x/rms(x), without weights.
    smear: channels that a gate over the previous token's embedding reads (12 is usual), 0 for no such gate.
    skips: U-Net skips from the first half of the visits to the second, "none", "add" or "gated".
    max_positions: size of a learned position embedding, which is then the longest sequence; 0 for none. logit_softcap:
    c of c·tanh(logits / c). head_bias: of an untied head.
    tokens_ahead: tokens predicted at each position, the next one by the head, each further one by a small layer of its
    own before the same head (arXiv:2404.19737). Training learns them all; scores and texts are those of the first.
    init_std: of new weights. embedding_std: of the embedding, None: init_std. in_init: of the matrices that read a
    layer's input, "normal" or "orthogonal"; out_init: of those that write its output, "normal" or "zero".
    """

    vocab_size: int
    d_model: int
    blocks: tuple[BlockConfig, ...]
    order: tuple[int, ...] | None = None
    loops: tuple[int, int, int] | None = None
    norm: str = "rms"
    norm_eps: float = 1e-6
    depth_scaled_norms: bool = False
    embedding_scale: float | None = None
    embedding_norm: bool = False
    smear: int = 0
    skips: str = "none"
    max_positions: int = 0
    tie_embeddings: bool = False
    head_bias: bool = False
    logit_softcap: float | None = None
    init_std: float = 0.02
    embedding_std: float | None = None
    in_init: str = "normal"
    out_init: str = "normal"
    tokens_ahead: int = later(1)

    def __post_init__(self) -> None:
        for name in ("blocks", "order", "loops"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_types(self, "model")
        require(self.vocab_size > 0, f"model: vocab_size must be positive, got {self.vocab_size}.")
        require(self.d_model > 0, f"model: d_model must be positive, got {self.d_model}.")
        check_norm("model", self.norm)
        require(self.max_positions >= 0, f"model: max_positions must not be negative, got {self.max_positions}.")
        require(not (self.head_bias and self.tie_embeddings), "model: tied embeddings have no head_bias.")
        require(self.tokens_ahead >= 1, f"model: tokens_ahead must be at least 1, got {self.tokens_ahead}.")
        require(len(self.blocks) > 0, "model: blocks is empty; give at least one BlockConfig.")
        self._settle_order()
        require(self.logit_softcap is None or self.logit_softcap > 0, "model: logit_softcap must be positive or None.")
        self._check_stream()
        self._check_init()

    def _settle_order(self) -> None:
        """Derive or check `order`."""
        if self.loops is not None:
            start, stop, count = self.loops
            require(
                0 <= start < stop <= len(self.blocks) and count >= 1,
                f"model: loops must be (start, stop, count) with 0 <= start < stop <= {len(self.blocks)} blocks and "
                f"count >= 1, got {self.loops}.",
            )
            derived = self.order_of_loops(count)
            require(
                self.order in (None, derived),
                f"model: loops {self.loops} visit the blocks in the order {derived}, but order is {self.order}. "
                "Leave one of them out.",
            )
            object.__setattr__(self, "order", derived)
        if self.order is None:
            object.__setattr__(self, "order", tuple(range(len(self.blocks))))
        self.check_order(self.visits)
        unused = sorted(set(range(len(self.blocks))) - set(self.visits))
        require(not unused, f"model: order never visits block(s) {unused}.")

    def check_order(self, order: tuple[int, ...]) -> None:
        """Refuse an order that names blocks which do not exist, or none."""
        bad = [i for i in order if not 0 <= i < len(self.blocks)]
        require(not bad, f"model: order names block(s) {bad}, but there are {len(self.blocks)} blocks.")
        require(len(order) > 0, "model: order is empty; it must visit at least one block.")
        lanes = [self.blocks[i].residual == "lanes" for i in order]
        late = all(lanes[lanes.index(True) :]) if True in lanes else True
        require(
            late, f"model: two lanes last to the end, but in the order {order} blocks without lanes come after them."
        )

    def _check_stream(self) -> None:
        require(self.skips in SKIPS, f"model: unknown skips {self.skips!r}.{near_names(self.skips, SKIPS)}")
        require(
            self.skips == "none" or len(self.visits) > 1,
            f"model: skips need a first and a second half, but order has one visit. Set skips to {SKIPS[0]!r}.",
        )
        require(
            0 <= self.smear <= self.d_model,
            f"model: smear must lie in 0..d_model {self.d_model} (channels that its gate reads), got {self.smear}.",
        )
        without = [i for i, block in enumerate(self.blocks) if block.norm_position == "post"]
        require(
            not self.depth_scaled_norms or not without,
            f"model: depth_scaled_norms scales the norms before mixer and feed-forward; block(s) {without} have none.",
        )

    def _check_init(self) -> None:
        require(
            self.embedding_std is None or self.embedding_std >= 0,
            f"model: embedding_std must not be negative, got {self.embedding_std}.",
        )
        for name, known in (("in_init", IN_INITS), ("out_init", OUT_INITS)):
            value = getattr(self, name)
            require(value in known, f"model: unknown {name} {value!r}.{near_names(value, known)}")

    def order_of_loops(self, count: int) -> tuple[int, ...]:
        """The order that visits the core `count` times. Raises ValueError for a model without `loops`."""
        require(self.loops is not None, "model: it has no loops (start, stop, count), so its order has no core.")
        require(count >= 1, f"model: the core must be visited at least once, got {count} loops.")
        start, stop, _ = cast(tuple[int, int, int], self.loops)
        # A config may come from anywhere, and the order is as long as it says.
        require(
            (stop - start) * count <= MOST_VISITS,
            f"model: {stop - start} block(s) cannot be visited {count} times; {MOST_VISITS} visits are possible.",
        )
        return (*range(start), *(tuple(range(start, stop)) * count), *range(stop, len(self.blocks)))

    def with_loops(self, count: int) -> "ModelConfig":
        """The same model with another number of loops."""
        self.order_of_loops(count)
        start, stop, _ = cast(tuple[int, int, int], self.loops)
        return replace(self, loops=(start, stop, count), order=None)

    @property
    def std_of_embedding(self) -> float:
        """`embedding_std`, or `init_std` where it is None."""
        return self.init_std if self.embedding_std is None else self.embedding_std

    @property
    def visits(self) -> tuple[int, ...]:
        """`order`, as numbers of blocks."""
        assert self.order is not None
        return self.order

    @property
    def signature(self) -> str:
        """A short fingerprint; states carry it, so that a state of another model is refused."""
        return self.signature_of(self.visits)

    def signature_of(self, order: tuple[int, ...]) -> str:
        """The signature of a model that visits its blocks in another order: its states are others."""
        return fingerprint(self.to_dict() | {"order": list(order)})

    def to_dict(self) -> dict[str, Any]:
        data = {key: getattr(self, key) for key in json_fields(self) if key not in ("blocks", "order")}
        loops = None if self.loops is None else list(self.loops)
        order = {"order": list(self.visits), "loops": loops}
        return data | order | {"blocks": [block.to_dict() for block in self.blocks]}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "ModelConfig":
        require(isinstance(data, dict), f"model config: expected an object, got {type(data).__name__}.")
        check_keys("model", data, ModelConfig.__dataclass_fields__, ["vocab_size", "d_model", "blocks"])
        require(isinstance(data["blocks"], list), f"model: blocks must be a list, got {data['blocks']!r}.")
        blocks: Any = tuple(BlockConfig.from_dict(block) for block in data["blocks"])
        return ModelConfig(**(data | {"blocks": blocks}))


def fingerprint(config: dict[str, Any]) -> str:
    """The signature of a config in its JSON form."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]
