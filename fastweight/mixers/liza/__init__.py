"""LiZA with Memory-as-Gate: attention and a linear memory over the same queries, keys and values, mixed per head."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastweight.configs import require
from fastweight.layers import keep_wide
from fastweight.mixers.attention import AttentionLayer, settle_cache
from fastweight.mixers.base import register
from fastweight.mixers.liza.config import LizaConfig
from fastweight.mixers.liza.memory import LizaMemory, LizaMemoryState
from fastweight.mixers.liza.recall import recall_losses
from fastweight.ops.attention import AttentionState
from fastweight.ops.sequences import recording, token_positions
from fastweight.state import register_state

__all__ = ["Branches", "Liza", "LizaConfig", "LizaMemoryState", "LizaState"]


@register_state
class LizaState(NamedTuple):
    """attention: keys and values, None where every head has μ = 1. memory: None where every head has μ = 0."""

    attention: AttentionState | None
    memory: LizaMemoryState | None


class _Projected(NamedTuple):
    """(q, k) without and with positions, and v."""

    plain: tuple[Tensor, Tensor]
    turned: tuple[Tensor, Tensor]
    v: Tensor


class Branches(NamedTuple):
    """Which of the two branches run."""

    softmax: bool
    linear: bool


@register("liza")
class Liza(AttentionLayer):
    """y = (1 − μ_h) · softmax attention + μ_h · delta-rule memory, per head, before the output projection.

    [B, T, D] → [B, T, D]. Where μ is 0 in every head this is the backbone's attention: the memory is neither read nor
    written and has no state. Where μ is 1 in every head softmax does not run and the state's size is constant. A layer
    with mag="learned" runs both while it trains, so that μ can leave either end.

    mag: μ of each head [num_heads], float32 or wider; values outside [0, 1] act as the nearer end.
    as_backbone: True reads as if μ were 0 (set by fastweight.convert.mag.backbone_view).
    Source: the gate of Titans' memory as a gate, arXiv:2501.00663, section 4.2, with the shared projections of TPTT,
    arXiv:2506.17671; the memory is the gated delta rule, arXiv:2412.06464.
    """

    Config = LizaConfig
    config: LizaConfig  # pyright: ignore[reportIncompatibleVariableOverride]  # narrower, and never replaced

    def __init__(self, d_model: int, config: LizaConfig):
        super().__init__(d_model, config)
        self.memory = LizaMemory(d_model, config, self.sizes[1] // self.head_dim, self.head_dim)
        start = torch.full((config.num_heads,), float(config.mag_weight), dtype=torch.float32)
        self.mag = nn.Parameter(start, requires_grad=config.mag == "learned")
        self.as_backbone = False
        self._known: tuple[int, Tensor, int, list[float]] | None = None
        require(
            config.order == 1 or config.trick == "derivative" or self.head_dim % 2 == 0,
            f"liza: trick {config.trick!r} turns pairs of channels; head_dim {self.head_dim} is odd. Use 'derivative'.",
        )

    @property
    def ops(self) -> tuple[str, ...]:
        return ("attention", "delta_rule")

    @property
    def has_memory(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # it depends on μ
        return self.branches().linear or self.config.window is None or self.config.num_sinks > 0

    @property
    def learns(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # it depends on μ
        return self.branches().linear

    def reset_parameters(self, init_std: float) -> None:
        super().reset_parameters(init_std)
        self.reset_memory(init_std)

    def reset_memory(self, init_std: float) -> None:
        """Draw what is not the backbone's: the memory's parameters; μ gets its initial value."""
        self.memory.reset_parameters(init_std)
        nn.init.constant_(self.mag, self.config.mag_weight)

    def mag_values(self) -> list[float]:
        """μ of each head as it acts, in [0, 1].

        On a GPU the numbers are fetched once and kept until the parameter is written in place or replaced, or the
        layer changes between training and evaluation; a write through `.data` alone is not noticed there. While a
        step is recorded they are those of the step before.
        """
        mag, known = self.mag.detach(), self._known
        if mag.is_meta:
            return [self.config.mag_weight] * mag.numel()
        if mag.device.type == "cpu":  # cheap to read
            return mag.clamp(0, 1).tolist()
        if mag.is_inference():  # it counts no writes, so it is read each time
            if known is None or not recording(mag):
                self._known = known = (id(self.mag), mag, 0, mag.clamp(0, 1).tolist())
            return known[3]
        # The number of the parameter tells a layer from a deep copy of it, whose count of writes starts anew.
        if (
            known is None
            or (known[0], known[2]) != (id(self.mag), mag._version)
            or known[1].data_ptr() != mag.data_ptr()
        ):
            self._known = known = (id(self.mag), mag, mag._version, mag.clamp(0, 1).tolist())
        return known[3]

    def train(self, mode: bool = True) -> "Liza":
        self._known = None
        return super().train(mode)

    def branches(self) -> Branches:
        """Which branches the present μ needs."""
        if self.as_backbone:
            return Branches(True, False)
        if self.config.mag == "learned" and self.training:
            return Branches(True, True)
        values = self.mag_values()
        # A μ that is not a number runs both and shows in the output.
        return Branches(not all(v >= 1 for v in values), not all(v <= 0 for v in values))

    def init_state(self, num_sequences: int) -> LizaState:
        softmax, linear = self.branches()
        cache = self.init_cache(num_sequences, self._window(linear)[1]) if softmax else None
        return LizaState(cache, self.memory.init_state(num_sequences) if linear else None)

    def parallel(self, x: Tensor, state: LizaState, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, LizaState]:
        softmax, linear = branches = self.branches()
        cache, memory = self._fit(state, branches)
        if not linear:
            assert cache is not None
            q, k, v = self.project(x, cache.position, cu_seqlens)
            seen, cache = self._attend(q, k, v, cache, cu_seqlens, linear)
            return self.merge(seen, x), LizaState(cache, None)
        assert memory is not None
        projected = self._project_both(x, memory.matrix.position, cu_seqlens, softmax)
        heads, memory = self._remember(x, projected, memory, cu_seqlens)
        if cache is not None:
            seen, cache = self._attend(*projected.turned, projected.v, cache, cu_seqlens, linear)
            heads = self._mix(seen, heads)
        return self.merge(heads.to(projected.v.dtype), x), LizaState(cache, memory)

    def settled(self, state: LizaState) -> LizaState | None:
        branches = self.branches()
        cache, memory = self._fit(state, branches)
        if cache is None:
            return LizaState(None, memory)
        cache = settle_cache(cache, self._window(branches.linear)[0])
        return None if cache is None else LizaState(cache, memory)

    def transfer_outputs(self, x: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both branches' heads [B, T, num_heads, head_dim] over x [B, T, D], each from an empty state, before mixing.

        First the backbone's own attention, without gradient; then the memory, float32 or wider. μ plays no part.
        """
        count = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        memory = self.memory.init_state(count)
        projected = self._project_both(x, memory.matrix.position, cu_seqlens, softmax=True)
        with torch.no_grad():
            cache = self.init_cache(count, self.config.num_sinks)
            seen, _ = self._attend(*projected.turned, projected.v, cache, cu_seqlens, linear=False)
        return seen, self._remember(x, projected, memory, cu_seqlens)[0]

    @torch.no_grad()
    def inner_losses(self, x: Tensor, state: LizaState) -> dict[str, Tensor] | None:
        """Squared recall error of the memory around each token's writes, as of the delta mixer; None without memory."""
        memory = self._fit(state, self.branches())[1]
        if memory is None:
            return None
        projected = self._project_both(x, memory.matrix.position, None, softmax=False)
        with torch.autocast(x.device.type, enabled=False):
            writes, _, _ = self.memory.project(x, *self._shared(projected), memory, None)
        return recall_losses(memory.matrix.memory, writes)

    def _window(self, linear: bool) -> tuple[int | None, int]:
        """(window, sinks) of softmax when the memory runs beside it, or does not."""
        c = self.config
        own = not linear or c.memory_window is None
        return (c.window, c.num_sinks) if own else (c.memory_window, c.memory_sinks)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: AttentionState, cu_seqlens: Tensor | None, linear: bool
    ) -> tuple[Tensor, AttentionState]:
        window, sinks = self._window(linear)
        return self.attend(q, k, v, cache, cu_seqlens, window=window, num_sinks=sinks)

    def _project_both(self, x: Tensor, position: Tensor, cu_seqlens: Tensor | None, softmax: bool) -> "_Projected":
        q, k, v = self.project_unrotated(x)
        # A memory without positions reads on beyond the last position that a rotation is made for.
        rotates = softmax or self.config.positions == "rope"
        turned = self.rotate(q, k, token_positions(position, x.shape[1], cu_seqlens)) if rotates else (q, k)
        return _Projected((q, k), turned, v)

    def _shared(self, projected: "_Projected") -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as the memory sees them."""
        return (*(projected.turned if self.config.positions == "rope" else projected.plain), projected.v)

    def _remember(
        self, x: Tensor, projected: "_Projected", memory: LizaMemoryState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LizaMemoryState]:
        shared = self._shared(projected)
        return self.memory(
            x, *shared, memory, cu_seqlens, backend=self.backend_of("delta_rule"), learning=self.learning
        )

    def _mix(self, seen: Tensor, read: Tensor) -> Tensor:
        mag = self.mag.to(read.dtype)
        # The gradient passes straight through the clamp: a head that stands at an end can leave it.
        mag = (mag.clamp(0, 1).detach() + (mag - mag.detach()))[:, None]
        return (1 - mag) * seen.to(read.dtype) + mag * read

    def _fit(self, state: LizaState, branches: Branches) -> LizaState:
        """The state without what the present μ does not use; refuse a state that μ has outgrown."""
        held = Branches(state.attention is not None, state.memory is not None)
        missing = [name for name in Branches._fields if getattr(branches, name) and not getattr(held, name)]
        if missing:  # not `require`: its message would fetch μ from a GPU at every call
            raise ValueError(
                f"liza: this state was made at a μ without the {' and '.join(missing)} branch, which the present μ "
                f"{self.mag_values()} needs. Read the text anew from init_state, or set the μ that it was made with."
            )
        full = branches.linear or not held.linear or self.config.memory_window is None
        require(
            full,
            f"liza: at μ = 0 the backbone's own attention needs keys that this state, made at μ > 0 with memory_window "
            f"{self.config.memory_window}, has dropped. Read the text anew from init_state.",
        )
        return LizaState(state.attention if branches.softmax else None, state.memory if branches.linear else None)

    def _apply(self, fn, recurse: bool = True) -> "Liza":
        """Conversions to a narrower dtype leave μ in float32."""
        own = (self.mag, self.mag.grad)
        return super()._apply(lambda t: keep_wide(t, fn) if any(t is m for m in own) else fn(t), recurse)
