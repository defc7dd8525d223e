"""The only model: embed → blocks visited in `order` → norm → head."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastweight import files
from fastweight.configs import check_keys, from_dict, require, to_json
from fastweight.layers import FeedForward, FeedForwardConfig, RMSNorm, ShortConv, init_linears
from fastweight.mixers import Mixer, MixerConfig, mixer_class
from fastweight.mixers.base import mixer_config
from fastweight.ops.conv import causal_conv
from fastweight.ops.sequences import advance, check_cu_seqlens
from fastweight.state import Faults, ModelState, register_state

FORMAT = "fastweight-model"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One block: pre-norm mixer, then pre-norm feed-forward.

    residual: "sequential" (x += mixer; x += feed-forward) or "parallel" (both read the same x; GPT-J).
    pre_conv: width of a causal convolution with its own norm and residual before the mixer, 0 for none.
    """

    mixer: MixerConfig
    feed_forward: FeedForwardConfig | None = None
    residual: str = "sequential"
    pre_conv: int = 0

    def __post_init__(self) -> None:
        require(
            self.residual in ("sequential", "parallel"),
            f'block: residual must be "sequential" or "parallel", got {self.residual!r}.',
        )
        require(self.pre_conv == 0 or self.pre_conv >= 2, f"block: pre_conv must be 0 or >= 2, got {self.pre_conv}.")

    def to_dict(self) -> dict[str, Any]:
        feed_forward = None if self.feed_forward is None else asdict(self.feed_forward)
        return {
            "mixer": self.mixer.to_dict(),
            "feed_forward": feed_forward,
            "residual": self.residual,
            "pre_conv": self.pre_conv,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "BlockConfig":
        check_keys("block", data, ["mixer", "feed_forward", "residual", "pre_conv"], ["mixer"])
        feed_forward = data.get("feed_forward")
        rest = {key: data[key] for key in ("residual", "pre_conv") if key in data}
        return BlockConfig(
            mixer=mixer_config(data["mixer"]),
            feed_forward=None if feed_forward is None else from_dict(FeedForwardConfig, feed_forward),
            **rest,
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model. `order` lists the blocks in the order of their visits; repeats give depth recurrence."""

    vocab_size: int
    d_model: int
    blocks: tuple[BlockConfig, ...]
    order: tuple[int, ...] | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    logit_softcap: float | None = None
    init_std: float = 0.02

    def __post_init__(self) -> None:
        require(self.vocab_size > 0, f"model: vocab_size must be positive, got {self.vocab_size}.")
        require(self.d_model > 0, f"model: d_model must be positive, got {self.d_model}.")
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
        return hashlib.sha256(to_json(self.to_dict()).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        data = {key: getattr(self, key) for key in self.__dataclass_fields__ if key not in ("blocks", "order")}
        return data | {"order": list(self.visits), "blocks": [block.to_dict() for block in self.blocks]}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "ModelConfig":
        require(isinstance(data, dict), f"model config: expected an object, got {type(data).__name__}.")
        check_keys("model", data, ModelConfig.__dataclass_fields__, ["vocab_size", "d_model", "blocks"])
        blocks = tuple(BlockConfig.from_dict(block) for block in data["blocks"])
        order = data.get("order")
        return ModelConfig(**(data | {"blocks": blocks, "order": None if order is None else tuple(order)}))


@register_state
class BlockState(NamedTuple):
    """conv: tail of the pre-convolution [N, width - 1, D] or None. mixer: the mixer's state."""

    conv: Tensor | None
    mixer: Any


class Block(nn.Module):
    """Pre-norm residual block around one mixer."""

    def __init__(self, d_model: int, norm_eps: float, config: BlockConfig):
        super().__init__()
        self.residual = config.residual
        self.conv_norm = RMSNorm(d_model, norm_eps) if config.pre_conv else None
        self.conv = ShortConv(d_model, config.pre_conv) if config.pre_conv else None
        self.mixer_norm = RMSNorm(d_model, norm_eps)
        self.mixer = mixer_class(config.mixer.kind)(d_model, config.mixer)
        self.feed_forward_norm = RMSNorm(d_model, norm_eps) if config.feed_forward else None
        self.feed_forward = FeedForward(d_model, config.feed_forward) if config.feed_forward else None

    def init_state(self, num_sequences: int) -> BlockState:
        tail = None if self.conv is None else self.conv.init_tail(num_sequences)
        return BlockState(tail, self.mixer.init_state(num_sequences))

    def forward(self, x: Tensor, state: BlockState, cu_seqlens: Tensor | None) -> tuple[Tensor, BlockState]:
        tail = state.conv
        if self.conv is not None and self.conv_norm is not None:
            assert tail is not None
            y, tail = causal_conv(self.conv_norm(x), self.conv.weight, self.conv.bias, tail, cu_seqlens=cu_seqlens)
            x = x + y
        y, mixer_state = self.mixer(self.mixer_norm(x), state.mixer, cu_seqlens=cu_seqlens)
        if self.feed_forward is None or self.feed_forward_norm is None:
            return x + y, BlockState(tail, mixer_state)
        if self.residual == "parallel":
            x = x + y + self.feed_forward(self.feed_forward_norm(x))
        else:
            x = x + y
            x = x + self.feed_forward(self.feed_forward_norm(x))
        return x, BlockState(tail, mixer_state)


class Model(nn.Module):
    """A language model with a state.

    `logits, state = model(tokens, state)` reads tokens [B, T] (or packed [1, total] with cu_seqlens) from `state` on.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config.d_model, config.norm_eps, block) for block in config.blocks)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: normal with `init_std`, then what each mixer adds."""
        nn.init.normal_(self.embedding.weight, std=self.config.init_std)
        init_linears(self, self.config.init_std)
        for mixer in self.mixers():
            mixer.reset_parameters(self.config.init_std)

    @staticmethod
    def from_preset(name: str, **changes: Any) -> "Model":
        """A freshly initialised model of a named size; `changes` replace fields of its config (e.g. vocab_size=257)."""
        from fastweight.presets import preset

        return Model(preset(name, **changes))

    def mixers(self) -> list[Mixer]:
        """The mixer of each block, in block order."""
        return [block.mixer for block in self.blocks]  # type: ignore[misc]  # ModuleList is untyped

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def set_backend(self, backend: str) -> "Model":
        """Use this backend in every mixer's op ("auto" chooses per call)."""
        for mixer in self.mixers():
            mixer.backend = backend
        return self

    @contextlib.contextmanager
    def frozen_memory(self) -> Iterator["Model"]:
        """Inside, no memory learns: same weights, no inner updates."""
        before = [mixer.learning for mixer in self.mixers()]
        try:
            for mixer in self.mixers():
                mixer.learning = False
            yield self
        finally:
            for mixer, learning in zip(self.mixers(), before, strict=True):
                mixer.learning = learning

    def init_state(self, num_sequences: int) -> ModelState:
        """The state before the first token of `num_sequences` sequences."""
        require(num_sequences > 0, f"init_state: num_sequences must be positive, got {num_sequences}.")
        visits = tuple(self.blocks[i].init_state(num_sequences) for i in self.config.visits)  # type: ignore[operator]
        position = torch.zeros(num_sequences, dtype=torch.int64, device=self.device)
        return ModelState(visits, position, self.config.signature)

    def forward(
        self, tokens: Tensor, state: ModelState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Logits [B, T, vocab_size] and the state after the last token.

        tokens: integers [B, T], or packed [1, total] with cu_seqlens [N+1]. state: B (or N) sequences, new if None.
        """
        x, state = self.features(tokens, state, cu_seqlens)
        return self.logits(x), state

    def features(
        self, tokens: Tensor, state: ModelState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """The normalised activations before the head, [B, T, D], and the new state."""
        self._check_tokens(tokens, cu_seqlens)
        num_sequences = tokens.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        state = self.init_state(num_sequences) if state is None else state
        self._check_state(state, num_sequences)
        x = self.embedding(tokens)
        visits = []
        for i, visit in zip(self.config.visits, state.visits, strict=True):
            x, visit = self._visit(self.blocks[i], x, visit, cu_seqlens)
            visits.append(visit)
        position = advance(state.position, tokens.shape[1], cu_seqlens)
        return self.norm(x), ModelState(tuple(visits), position, state.signature, state.note)

    def logits(self, features: Tensor) -> Tensor:
        """Apply the head (and soft cap c·tanh(logits/c)) to features."""
        logits = F.linear(features, self.embedding.weight) if self.head is None else self.head(features)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _visit(self, block: nn.Module, x: Tensor, state: BlockState, cu_seqlens: Tensor | None) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, state, cu_seqlens, use_reentrant=False)
        return block(x, state, cu_seqlens)

    def _check_tokens(self, tokens: Tensor, cu_seqlens: Tensor | None) -> None:
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.numel() == 0:
            raise ValueError(f"tokens must be integers [B, T] with T >= 1, got {tokens.dtype} {list(tokens.shape)}.")
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, tokens.shape[1], tokens.shape[0])
        if tokens.device.type == "cpu":  # on a GPU this check would stall the device; the embedding asserts there
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(
                    f"token id {bad} is outside the vocabulary [0, {self.config.vocab_size}). "
                    "Is this the tokenizer that the model was trained with?"
                )

    def _check_state(self, state: ModelState, num_sequences: int) -> None:
        if state.signature != self.config.signature:
            raise ValueError(
                f"this state belongs to another model (signature {state.signature}, this model is "
                f"{self.config.signature}). Start from model.init_state({num_sequences})."
            )
        if state.num_sequences != num_sequences:
            raise ValueError(
                f"the state holds {state.num_sequences} sequences, the input {num_sequences}. "
                "Use state.select([...]) to choose or repeat sequences."
            )

    def describe_faults(self, state: ModelState) -> list[str]:
        """One sentence per sequence and visit whose inner updates were not finite (and were skipped)."""
        found = []
        for visit, (block, entry) in enumerate(zip(self.config.visits, state.visits, strict=True)):
            for faults in _find_faults(entry):
                counts, firsts = faults.count.tolist(), faults.first.tolist()
                kind = self.config.blocks[block].mixer.kind
                found += [
                    f"visit {visit} (block {block}, {kind}): {count} inner update(s) of sequence {n} were not finite "
                    f"and were skipped, the first at position {first}"
                    for n, (count, first) in enumerate(zip(counts, firsts, strict=True))
                    if count
                ]
        return found

    def save(self, path: str | Path) -> None:
        """Write config.json and model.safetensors into the folder `path`; each file is replaced atomically."""
        path = Path(path)
        weights = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        header = {"format": FORMAT, "signature": self.config.signature}
        files.write_atomically(path / "model.safetensors", lambda temporary: save_file(weights, temporary, header))
        text = to_json({"format": FORMAT, "version": VERSION, "config": self.config.to_dict()})
        files.write_text(path / "config.json", text + "\n")


def load(path: str | Path, device: torch.device | str = "cpu") -> Model:
    """Load a model folder written by `Model.save`. Every tensor must be there, with its shape, and no other."""
    path = Path(path)
    model = Model(load_config(path))
    weights_file = path / "model.safetensors"
    require(weights_file.is_file(), f"{path}: model.safetensors is missing; is this a model folder?")
    try:
        weights = load_file(weights_file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights_file} is truncated or damaged ({error}). Restore it from a copy.") from error
    check_weights(str(weights_file), weights, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    # A checkpoint keeps its dtype: bfloat16 weights make a bfloat16 model.
    for name, tensor in weights.items():
        model.get_parameter(name).data = tensor
    return model.to(device)


def load_config(path: str | Path) -> ModelConfig:
    """The ModelConfig of a model folder."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; a model folder holds config.json and model.safetensors.")
    try:
        data = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}).") from error
    require(isinstance(data, dict) and data.get("format") == FORMAT, f"{file} is not a {FORMAT} config.")
    require(data.get("version") == VERSION, f"{file}: version {data.get('version')}, this library reads {VERSION}.")
    return ModelConfig.from_dict(data.get("config"))  # type: ignore[arg-type]  # from_dict checks


def check_weights(source: str, found: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    """Refuse missing, unexpected and misshapen tensors by name."""
    problems = [f"missing {name} {list(shape)}" for name, shape in wanted.items() if name not in found]
    problems += [f"unexpected {name} {list(t.shape)}" for name, t in found.items() if name not in wanted]
    problems += [
        f"{name} has shape {list(t.shape)}, needs {list(wanted[name])}"
        for name, t in found.items()
        if name in wanted and tuple(t.shape) != wanted[name]
    ]
    more = f" … and {len(problems) - 8} more" if len(problems) > 8 else ""
    require(not problems, f"{source} does not fit this model: {'; '.join(problems[:8])}{more}.")


def _find_faults(tree: Any) -> Iterator[Faults]:
    if isinstance(tree, Faults):
        yield tree
    elif isinstance(tree, tuple):
        for child in tree:
            yield from _find_faults(child)
