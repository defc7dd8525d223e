"""What a report measures, and how much of it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastweight.configs import check_types, require
from fastweight.evaluate.grow import PHASE_TOKENS

_COUNTS = ("tail_tokens", "documents", "passkey_trials", "pair_trials", "prefill_tokens", "decode_tokens", "repeats")
_COUNTS += ("read_tokens", "divergence_tokens", "batch_size", "piece_tokens")


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Lengths are in tokens. An empty tuple leaves its part out; only `lengths` must hold one.

    lengths: of the text scored; tail_tokens: last targets of each length, scored apart; documents: at most so many.
    divergence_tokens: of each document, for the divergence from the backbone (at most the greatest of lengths).
    passkey_lengths, passkey_depths, passkey_trials (per depth), passkey_choices: as in `passkey_prompts`.
    pairs, pair_trials: numbers of key-value pairs, and prompts of each.
    speed_lengths, prefill_tokens, decode_tokens, repeats, read_tokens: as in `measure_speed`.
    batch_size: texts read side by side; piece_tokens: tokens of each read at a time. seed: of prompts and random text.
    precision: bfloat16 turns the weights of every model of a conversion to it, as a GPU serves them; kept: as they are.
    """

    lengths: tuple[int, ...] = (512, 2048, 8192)
    tail_tokens: int = 512
    documents: int = 8
    divergence_tokens: int = 2048
    passkey_lengths: tuple[int, ...] = (512, 2048, 8192)
    passkey_depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    passkey_trials: int = 2
    passkey_choices: int = 8
    pairs: tuple[int, ...] = (4, 16, 64)
    pair_trials: int = 32
    speed_lengths: tuple[int, ...] = (1024, 32768)
    prefill_tokens: int = 512
    decode_tokens: int = 16
    repeats: int = 5
    read_tokens: int = 4096
    batch_size: int = 4
    piece_tokens: int = 1024
    seed: int = 0
    device: str = "auto"
    precision: Literal["kept", "bfloat16"] = "kept"

    def __post_init__(self) -> None:
        check_types(self, "report")
        require(len(self.lengths) > 0, "report: lengths is empty; give at least one length of text.")
        for name in ("lengths", "passkey_lengths", "pairs", "speed_lengths"):
            values = getattr(self, name)
            require(
                all(v >= 1 for v in values) and list(values) == sorted(set(values)),
                f"report: {name} must be positive and grow, got {list(values)}.",
            )
        for name in _COUNTS:
            require(getattr(self, name) >= 1, f"report: {name} must be at least 1, got {getattr(self, name)}.")
        require(
            not self.speed_lengths or self.speed_lengths[0] > self.prefill_tokens,
            f"report: speed_lengths must exceed prefill_tokens {self.prefill_tokens}, got {list(self.speed_lengths)}.",
        )

    @property
    def longest(self) -> int:
        """The most tokens that any part reads, answers included."""
        read = [self.lengths[-1], *(4 * n + 3 for n in self.pairs), *(n + 16 for n in self.passkey_lengths)]
        return max(read + [n + self.decode_tokens for n in self.speed_lengths])

    @property
    def tokens_per_model(self) -> int:
        """Tokens that one model reads, about: what a report costs, with the tokens per second of the machine.

        The divergence counts twice, because the backbone reads along. Where a long state cannot be made, more is read.
        """
        texts = self.documents * (self.lengths[-1] + 2 * min(self.divergence_tokens, self.lengths[-1]))
        passkeys = len(self.passkey_depths) * self.passkey_trials * sum(self.passkey_lengths)
        pairs = self.pair_trials * sum(4 * n + 3 for n in self.pairs)
        before = sum(min(n - self.prefill_tokens, max(self.read_tokens, 2 * PHASE_TOKENS)) for n in self.speed_lengths)
        steps = (self.repeats + 1) * (self.prefill_tokens + self.decode_tokens) * len(self.speed_lengths)
        return texts + passkeys + pairs + before + steps

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


# A few minutes per model of 135 million parameters on a laptop; the defaults want a GPU, or patience.
QUICK = ReportSettings(
    lengths=(512, 2048), documents=4, divergence_tokens=512, passkey_lengths=(512,), passkey_trials=2, pairs=(4, 16),
    pair_trials=16, prefill_tokens=128, decode_tokens=4, repeats=3, read_tokens=1024,
)  # fmt: skip
