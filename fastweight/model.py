"""The only model: embed → blocks visited in `order` → norm → head."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastweight.block import Block, BlockState
from fastweight.configs import near_names, require
from fastweight.in_place import InPlaceFeedForward
from fastweight.init import draw_projections
from fastweight.layers import AheadLayer, UnitRMSNorm, init_linears, make_norm
from fastweight.mixers import Mixer
from fastweight.model_config import BlockConfig, ModelConfig
from fastweight.model_folder import FORMAT, check_weights, load_config, read_config, read_origin, write_settings
from fastweight.ops import dispatch
from fastweight.ops.sequences import INTEGERS, advance, check_cu_seqlens, token_positions
from fastweight.residual import ResidualWeights, Skips, SmearGate
from fastweight.state import Faults, ModelState, Relay
from fastweight.tensor_files import read_tensors, write_tensors

__all__ = ["Block", "BlockConfig", "BlockState", "Model", "ModelConfig", "check_weights", "load", "load_config"]


class Model(nn.Module):
    """A language model with a state.

    visits: the blocks in the order in which they are visited now, that of the config unless `set_order` changed it.
    origin: where pretrained weights came from, {"family": ..., "config": ...}; saved with them, else None.
    relay: set while other processes read the rest of the same sequences (fastweight.distributed.context), else None.

    `logits, state = model(tokens, state)` reads tokens [B, T] (or packed [1, total] with cu_seqlens) from `state` on.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.visits, self.signature = config.visits, config.signature
        self.checkpointing = False
        self.origin: dict[str, Any] | None = None
        self.relay: Relay | None = None
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_positions, config.d_model) if config.max_positions else None
        self.embedding_norm = UnitRMSNorm(config.d_model, config.norm_eps) if config.embedding_norm else None
        self.smear = SmearGate(config.smear) if config.smear else None
        self.skips = None if config.skips == "none" else Skips(config.d_model, config.skips, len(config.visits))
        self.blocks = nn.ModuleList(Block(config, index) for index in range(len(config.blocks)))
        self.norm = make_norm(config.norm, config.d_model, config.norm_eps)
        head = (config.d_model, config.vocab_size, config.head_bias)
        self.head = None if config.tie_embeddings else nn.Linear(*head)
        self.reset_parameters()
        # Drawn after all else: the other weights are those of the same seed without further tokens.
        self.ahead = nn.ModuleList(AheadLayer(config.d_model) for _ in range(config.tokens_ahead - 1))

    def reset_parameters(self) -> None:
        """Draw new weights: normal with `init_std`, what each memory adds, then what the config asks for beside."""
        config = self.config
        nn.init.normal_(self.embedding.weight, std=config.std_of_embedding)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=self.config.init_std)
        init_linears(self, self.config.init_std)
        for memory in self.memories():
            memory.reset_parameters(self.config.init_std)
        for part in self.modules():
            if isinstance(part, (AheadLayer, ResidualWeights, Skips, SmearGate)):
                part.reset_parameters()
        draw_projections(self.blocks, config.in_init, config.out_init)

    @staticmethod
    def from_preset(name: str, **changes: Any) -> "Model":
        """A freshly initialised model of a named size; `changes` replace fields of its config (e.g. vocab_size=257)."""
        from fastweight.presets import preset

        return Model(preset(name, **changes))

    def mixers(self) -> list[Mixer]:
        """The mixer of each block, in block order."""
        return [block.mixer for block in self.blocks]  # type: ignore[misc]  # ModuleList is untyped

    def memories(self) -> list[Mixer | InPlaceFeedForward]:
        """Every part that has an op and may learn, in block order: mixers, and feed-forwards with a memory."""
        return [memory for block in self.blocks for memory in block.memories()]  # type: ignore[operator]  # untyped

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def set_backend(self, backend: str) -> "Model":
        """Use this backend in every layer with an op that has it ("auto" chooses per call).

        Raises ValueError if no op of the model has one of that name.
        """
        able = [m for m in self.memories() if not m.ops or any(dispatch.known(op, backend) for op in m.ops)]
        names = {name for memory in self.memories() for op in memory.ops for name in dispatch.backends(op)}
        require(
            not names or backend in {*names, "auto"},
            f"set_backend: no op of this model has a backend {backend!r}.{near_names(backend, [*names, 'auto'])}",
        )
        for memory in able:
            memory.backend = backend
        return self

    def set_order(self, order: Sequence[int] | None = None) -> "Model":
        """Visit the blocks in this order from now on, None: that of the config, which is also what is saved.

        A state belongs to its order. Raises ValueError for more visits than there are skips or weights per visit.
        """
        order = self.config.visits if order is None else tuple(order)
        self.config.check_order(order)
        for index, block in enumerate(self.config.blocks):
            visits, own = order.count(index), self.config.visits.count(index)
            require(
                not block.per_visit or visits <= own,
                f"set_order: block {index} has weights for {own} visits of its own, the order visits it {visits} "
                "times. Use fewer loops, or a model whose visits share their weights (per_visit False).",
            )
        have = len(order) if self.skips is None else 2 * len(self.skips.weight) + 1
        require(
            len(order) <= have,
            f"set_order: this model has skips for at most {have} visits, the order makes {len(order)}. Use fewer "
            "loops, or a model without skips.",
        )
        if order != self.visits:
            self.visits, self.signature = order, self.config.signature_of(order)
        return self

    def set_loops(self, count: int | None = None) -> "Model":
        """Visit the core `count` times from now on, None: as often as the config says. See `set_order`."""
        return self.set_order(None if count is None else self.config.order_of_loops(count))

    @contextlib.contextmanager
    def frozen_memory(self) -> Iterator["Model"]:
        """Inside, no memory learns: same weights, no inner updates."""
        with contextlib.ExitStack() as stack:
            for memory in self.memories():
                stack.enter_context(_learning(memory, False))
            yield self

    def init_state(self, num_sequences: int) -> ModelState:
        """The state before the first token of `num_sequences` sequences."""
        require(num_sequences > 0, f"init_state: num_sequences must be positive, got {num_sequences}.")
        visits = tuple(self.blocks[i].init_state(num_sequences) for i in self.visits)  # type: ignore[operator]  # untyped
        position = torch.zeros(num_sequences, dtype=torch.int64, device=self.device)
        last = None if self.smear is None else self.embedding.weight.new_zeros(num_sequences, 1, self.config.d_model)
        return ModelState(visits, position, self.signature, last=last)

    def settled(self, state: ModelState) -> ModelState | None:
        """The same state in tensors that no later token makes larger; None if it grows with the text."""
        visits = tuple(
            self.blocks[i].settled(part)  # type: ignore[operator]  # untyped
            for i, part in zip(self.visits, state.visits, strict=True)
        )
        known = None if None in visits else visits
        return None if known is None else ModelState(known, state.position, state.signature, state.note, state.last)

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
        if self.relay is not None:
            return self.relay.read(self, tokens, state)
        return self.read(tokens, state, cu_seqlens)

    def read(self, tokens: Tensor, state: ModelState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, ModelState]:
        """`features` in one piece."""
        self._check_tokens(tokens, cu_seqlens)
        num_sequences = tokens.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        state = self.init_state(num_sequences) if state is None else state
        self._check_state(state, num_sequences)
        x, last = self._embed(tokens, state.position, cu_seqlens), state.last
        if self.smear is not None:
            x, last = self._relayed(self.smear, x, last, cu_seqlens)
        x, visits = self._visit_all(x, state.visits, cu_seqlens)
        position = advance(state.position, tokens.shape[1], cu_seqlens)
        return self.norm(x), ModelState(visits, position, state.signature, state.note, last)

    def _visit_all(self, x: Tensor, states: tuple, cu_seqlens: Tensor | None) -> tuple[Tensor, tuple]:
        """Visit the blocks in order, with skips from the first half to the second; two lanes end in their mean."""
        embedded, half = x, len(self.visits) // 2
        visits, kept = [], []
        for place, (i, state) in enumerate(zip(self.visits, states, strict=True)):
            if self.skips is not None and place >= half and kept:
                x = self.skips(x, kept.pop(), place - half)
            number = self.visits[:place].count(i) if self.config.blocks[i].per_visit else 0
            x, state = self._relayed(partial(self._visit, i), x, state, cu_seqlens, embedded, number)
            visits.append(state)
            if self.skips is not None and place < half:
                kept.append(x)
        return x.mean(0) if x.dim() == 4 else x, tuple(visits)

    def _relayed(self, part: Callable[..., Any], x: Tensor, state: Any, *others: Any) -> tuple[Tensor, Any]:
        """What `part` makes of x from `state` on, or from what the process before hands on."""
        if self.relay is None:
            return part(x, state, *others)
        return self.relay.send(*part(*self.relay.receive(x, state), *others))

    def _embed(self, tokens: Tensor, position: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        x, scale = self.embedding(tokens), self.config.embedding_scale
        # The factor is rounded to the weights' dtype first, as the published models do.
        x = x if scale is None else x * torch.tensor(scale, dtype=x.dtype, device=x.device)
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        if self.positions is None:
            return x
        where = token_positions(position, tokens.shape[1], cu_seqlens)
        # On a GPU the embedding asserts; a look at the numbers would stall the device.
        if not where.is_cuda and not torch.compiler.is_compiling() and int(where.max()) >= self.config.max_positions:
            raise ValueError(
                f"this model has positions for {self.config.max_positions} tokens, the sequence goes on to "
                f"{int(where.max()) + 1}. Read shorter texts."
            )
        return x + self.positions(where)

    def logits(self, features: Tensor, ahead: int = 0) -> Tensor:
        """Apply the head (and soft cap c·tanh(logits/c)) to features; of the token `ahead` places after the next."""
        count = self.config.tokens_ahead
        require(
            0 <= ahead < count, f"logits: this model predicts {count} token(s), ahead must be below it, got {ahead}."
        )
        features = self.ahead[ahead - 1](features) if ahead else features
        logits = F.linear(features, self.embedding.weight) if self.head is None else self.head(features)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _visit(self, index: int, *inputs: Any) -> Any:
        """What block `index` makes of its inputs."""
        block: Any = self.blocks[index]
        if self.checkpointing and torch.is_grad_enabled():
            learning = [memory.learning for memory in block.memories()]
            return checkpoint(self._reread, block, learning, *inputs, use_reentrant=False)
        return block(*inputs)

    @staticmethod
    def _reread(block: Any, learning: list[bool], *inputs: Any) -> Any:
        """Run the block with the memory as it was at the first pass: the second one may come after `frozen_memory`."""
        with contextlib.ExitStack() as stack:
            for memory, was in zip(block.memories(), learning, strict=True):
                stack.enter_context(_learning(memory, was))
            return block(*inputs)

    def _check_tokens(self, tokens: Tensor, cu_seqlens: Tensor | None) -> None:
        got = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
        if not isinstance(tokens, Tensor) or tokens.dtype not in INTEGERS or tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens must be integers [B, T] (torch.int64 or int32) with T >= 1, got {got}.")
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, tokens.shape[1], tokens.shape[0])
        # On a GPU this check would stall the device; the embedding asserts there. It would break a compiled graph.
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(
                    f"token id {bad} is outside the vocabulary [0, {self.config.vocab_size}). "
                    "Is this the tokenizer that the model was trained with?"
                )

    def _check_state(self, state: ModelState, num_sequences: int) -> None:
        if not isinstance(state, ModelState):
            raise TypeError(f"state must be a ModelState, got {type(state).__name__}. Use model.init_state.")
        if state.signature != self.signature:
            raise ValueError(
                f"this state belongs to another model (signature {state.signature}, this model is "
                f"{self.signature}). Start from model.init_state({num_sequences})."
            )
        if state.num_sequences != num_sequences:
            raise ValueError(
                f"the state holds {state.num_sequences} sequences, the input {num_sequences}. "
                "Use state.select([...]) to choose or repeat sequences."
            )

    def describe_faults(self, state: ModelState) -> list[str]:
        """One sentence per sequence and visit whose inner updates were not finite (and were skipped)."""
        found = []
        for visit, (block, entry) in enumerate(zip(self.visits, state.visits, strict=True)):
            parts = (entry.mixer, self.config.blocks[block].mixer.kind), (entry.feed_forward, "in-place feed-forward")
            for faults, name in ((faults, name) for part, name in parts for faults in _find_faults(part)):
                counts, firsts = faults.count.tolist(), faults.first.tolist()
                found += [
                    f"visit {visit} (block {block}, {name}): {count} inner update(s) of sequence {n} were not finite "
                    f"and were skipped, the first at position {first}"
                    for n, (count, first) in enumerate(zip(counts, firsts, strict=True))
                    if count
                ]
        return found

    def _check_own_tensors(self) -> None:
        with torch.device("meta"):
            own = Model(self.config).state_dict().keys()
        foreign = [name for name in self.state_dict() if name not in own]
        require(
            not foreign,
            f"this model holds tensors that are not its own: {', '.join(foreign[:4])}. Merge adapters before saving it "
            "(fastweight.train.lora.merge_and_unload), or save it through PEFT.",
        )

    def save(self, path: str | Path) -> None:
        """Write config.json, model.safetensors and, if there is one, origin.json into the folder `path`.

        Each file is replaced atomically. Raises ValueError for a model with tensors that its config does not describe,
        such as adapters: the folder could not be read again.
        """
        path = Path(path)
        self._check_own_tensors()
        header = {"format": FORMAT, "signature": self.config.signature}
        write_tensors(path / "model.safetensors", self.state_dict(), header)
        write_settings(path, self.config, self.origin)


def load(path: str | Path, device: torch.device | str = "cpu") -> Model:
    """Load a model folder written by `Model.save`. Every tensor must be there, with its shape, and no other.

    Raises ValueError if a file is damaged, or if config.json is not the one that was saved with the weights.
    """
    path = Path(path)
    config, signature = read_config(path)
    model = Model(config)
    weights_file = path / "model.safetensors"
    require(weights_file.is_file(), f"{path}: model.safetensors is missing; is this a model folder?")
    header, weights = read_tensors(weights_file, "Restore it from a copy.")
    check_weights(str(weights_file), weights, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    require(
        header.get("signature", signature) == signature,
        f"{path}: config.json (signature {signature}) is not the one that model.safetensors was saved with "
        f"({header.get('signature')}): the weights would fit, but compute something else. Restore the folder from a "
        "copy; to change a setting, load the model, build Model(new config), and load_state_dict into it.",
    )
    # A checkpoint keeps its dtype: bfloat16 weights make a bfloat16 model.
    for name, tensor in weights.items():
        model.get_parameter(name).data = tensor
    model.origin = read_origin(path)
    return model.to(device)


@contextlib.contextmanager
def _learning(memory: Mixer | InPlaceFeedForward, learning: bool) -> Iterator[None]:
    before, memory.learning = memory.learning, learning
    try:
        yield
    finally:
        memory.learning = before


def _find_faults(tree: Any) -> Iterator[Faults]:
    if isinstance(tree, Faults):
        yield tree
    elif isinstance(tree, tuple):
        for child in tree:
            yield from _find_faults(child)
