"""What every memory layer is: a module with a state, read and written by one method."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from fastweight.configs import check_keys, from_dict, json_fields, near_names, require
from fastweight.layers import init_linears
from fastweight.ops import dispatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """Base of the mixers' configs. `kind` is set by `register` and names the mixer in JSON."""

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {"kind": self.kind, **{name: values[name] for name in json_fields(self)}}


class Mixer(nn.Module):
    """A layer that mixes tokens through a state.

    Subclasses write `init_state` and `parallel`. Training, scoring, prefill and decoding all go through them, so they
    must agree for every cut of a sequence; the law tests check that for each registered mixer.

    Config: the mixer's config class. op: name of the op behind it (for backends), or None.
    has_memory: what lies beyond any attention window can still change the output; an instance may say otherwise.
    learns: there is an inner loop that `learning = False` stops.
    backend: which implementation of the op runs; never stored. learning: False freezes the memory at its initial value.
    """

    kind: ClassVar[str]
    Config: ClassVar[type[MixerConfig]]
    op: ClassVar[str | None] = None
    has_memory: bool = True
    learns: bool = True

    def __init__(self, d_model: int, config: Any):
        super().__init__()
        self.d_model = d_model
        self.config = config
        self.backend = "auto"
        self.learning = True

    @property
    def ops(self) -> tuple[str, ...]:
        """The names of all ops behind the layer; one that has several says so here."""
        return () if self.op is None else (self.op,)

    def backend_of(self, op: str) -> str:
        """The backend that `op` of this layer takes."""
        return dispatch.named_or_auto(op, self.backend)

    def init_state(self, num_sequences: int) -> Any:
        """The state of `num_sequences` sequences before their first token; differentiable where it is learned."""
        raise TypeError(f"{type(self).__name__} must define init_state(num_sequences)")

    def parallel(self, x: Tensor, state: Any, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        """Read x [B, T, D] (or packed [1, total, D] with cu_seqlens [N+1]) from `state` on: y and the new state."""
        raise TypeError(f"{type(self).__name__} must define parallel(x, state, *, cu_seqlens=None)")

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read one token per sequence, x [B, 1, D]."""
        return self.parallel(x, state)

    def settled(self, state: Any) -> Any | None:
        """The same state in tensors that no later token makes larger; None if it grows with the text."""
        return state

    def acts_at(self, position: int) -> bool:
        """Whether the step that reads the token at `position` does more than others, so that the host must know."""
        return False

    def forward(self, x: Tensor, state: Any, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        return self.parallel(x, state, cu_seqlens=cu_seqlens)

    def reset_parameters(self, init_std: float) -> None:
        """Initialise the projections; mixers with further parameters extend this."""
        init_linears(self, init_std)

    def projections(self) -> tuple[list[Tensor], Tensor]:
        """The matrices that read the layer's input (q, k and v apart, as views), and the one that writes its output."""
        raise TypeError(f"{type(self).__name__} must define projections() to be drawn with in_init or out_init")

    def inner_losses(self, x: Tensor, state: Any) -> dict[str, Tensor] | None:
        """Inner-loop statistics over x [B, T, D]: series named as in docs/layers.md, or None without an inner loss."""
        return None


_MIXERS: dict[str, type[Mixer]] = {}
M = TypeVar("M", bound=type[Mixer])


def register(kind: str) -> Callable[[M], M]:
    """Class decorator: makes a mixer known under `kind` in configs, presets, checkpoints and the law tests."""

    def keep(cls: M) -> M:
        known = _MIXERS.get(kind)
        same = known is not None and (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
        require(known is None or same, f"mixer kind {kind!r} is taken by {known}. Choose another name.")
        require(
            isinstance(getattr(cls, "Config", None), type) and issubclass(cls.Config, MixerConfig),
            f"mixer {kind!r}: class {cls.__name__} needs a Config that subclasses MixerConfig.",
        )
        cls.kind = cls.Config.kind = kind
        _MIXERS[kind] = cls
        return cls

    return keep


def mixer_kinds() -> list[str]:
    """All registered kinds, sorted."""
    return sorted(_MIXERS)


def mixer_class(kind: str) -> type[Mixer]:
    """The mixer registered as `kind`. Raises ValueError naming near kinds."""
    require(kind in _MIXERS, f"unknown mixer {kind!r}.{near_names(str(kind), _MIXERS)}")
    return _MIXERS[kind]


def mixer_config(data: dict[str, Any]) -> MixerConfig:
    """Build a mixer's config from its JSON object (with its "kind")."""
    require(isinstance(data, dict), f"mixer: expected an object with keys, got {type(data).__name__}.")
    check_keys("mixer", {"kind": None} if "kind" in data else {}, ["kind"], ["kind"])
    rest = {key: value for key, value in data.items() if key != "kind"}
    return from_dict(mixer_class(data["kind"]).Config, rest)
