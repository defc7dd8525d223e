"""The measurements of one model, each kept as a part of its own."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from fastweight.configs import require
from fastweight.data.tokenizers import Tokenizer
from fastweight.evaluate.divergence import divergence
from fastweight.evaluate.lengths import LengthScores, score_lengths
from fastweight.evaluate.long_texts import LongTexts
from fastweight.evaluate.recall import Prompt, Recall, ask
from fastweight.evaluate.recall_prompts import pair_prompts, passkey_prompts
from fastweight.evaluate.speed import Speed, machine, measure_speed
from fastweight.model import Model
from fastweight.report.parts import Parts, fingerprint, model_fingerprint
from fastweight.report.settings import ReportSettings

Bar = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Material:
    """What every model is given: the same texts and the same prompts, by length or number of pairs."""

    texts: LongTexts
    passkeys: dict[int, list[Prompt]]
    pairs: dict[int, list[Prompt]]


def make_material(
    texts: LongTexts, tokenizer: Tokenizer, settings: ReportSettings, filler: Sequence[str] | None
) -> Material:
    """The texts, and the prompts that the settings ask for."""
    options: dict[str, Any] = {"depths": settings.passkey_depths, "trials": settings.passkey_trials}
    options |= {"choices": settings.passkey_choices, "seed": settings.seed, "filler": filler}
    return Material(
        texts=texts,
        passkeys={n: passkey_prompts(tokenizer, n, **options) for n in settings.passkey_lengths},
        pairs={n: pair_prompts(tokenizer, n, trials=settings.pair_trials, seed=settings.seed) for n in settings.pairs},
    )


class Measurer:
    """Measures models on one material; `backbone` is what they are held against."""

    def __init__(self, material: Material, settings: ReportSettings, parts: Parts, bar: Bar):
        self.material, self.settings, self.parts, self.bar = material, settings, parts, bar
        self.batching = {"batch_size": settings.batch_size, "piece_tokens": settings.piece_tokens}

    def measure(self, name: str, model: Model, backbone: Model | None) -> dict[str, Any]:
        """All figures of `model`; backbone None: it is the backbone, and does not diverge from itself."""
        longest, places = self.settings.longest, model.config.max_positions
        require(
            places == 0 or places >= longest,
            f"report: {name!r} has positions for {places:,} tokens, and the settings read up to {longest:,}. "
            "Ask for shorter lengths.",
        )
        key = {"model": model_fingerprint(model), "device": model.device.type}
        figures = {"parameters": model.num_parameters, "fingerprint": key["model"], "machine": machine(model)}
        figures |= self._lengths(name, model, key)
        figures["divergence"] = None if backbone is None else self._divergence(name, model, backbone, key)
        figures["passkey"] = self._recall(name, model, key, "passkey", self.material.passkeys)
        figures["pairs"] = self._recall(name, model, key, "pairs", self.material.pairs)
        figures["speed"] = self._speed(name, model, key)
        return figures

    def _lengths(self, name: str, model: Model, key: dict[str, Any]) -> dict[str, Any]:
        texts, s = self.material.texts, self.settings
        key = key | {"texts": _texts_fingerprint(texts), "lengths": s.lengths, "tail": s.tail_tokens}

        def measure() -> dict[str, Any]:
            with self.bar(f"{name}: loss by length") as progress:
                found = score_lengths(
                    model, texts, s.lengths, tail_tokens=s.tail_tokens, progress=progress, **self.batching
                )
            return _plain_lengths(found)

        return self.parts.get("lengths", key, measure)

    def _divergence(self, name: str, model: Model, backbone: Model, key: dict[str, Any]) -> dict[str, Any]:
        texts = self.material.texts.cut(min(self.settings.divergence_tokens, self.material.texts.num_targets))
        key = key | {"texts": _texts_fingerprint(texts), "backbone": model_fingerprint(backbone)}

        def measure() -> dict[str, Any]:
            with self.bar(f"{name}: divergence") as progress:
                found = divergence(backbone, model, texts, progress=progress, **self.batching)
            positions = [bucket.to_dict() for bucket in found.positions]
            derived = {"mean": found.mean, "mean_agreement": found.mean_agreement, "positions": positions}
            return asdict(found) | derived

        return self.parts.get("divergence", key, measure)

    def _recall(
        self, name: str, model: Model, key: dict[str, Any], task: str, prompts: dict[int, list[Prompt]]
    ) -> list[dict[str, Any]]:
        def measure(size: int) -> dict[str, Any]:
            with self.bar(f"{name}: {task} {size:,}") as progress:
                found = ask(model, prompts[size], progress=progress, **self.batching)
            return _plain_recall(size, found)

        asked = {size: key | {"prompts": _prompts_fingerprint(some)} for size, some in prompts.items()}
        return [self.parts.get(task, asked[size], lambda size=size: measure(size)) for size in prompts]

    def _speed(self, name: str, model: Model, key: dict[str, Any]) -> list[dict[str, Any]]:
        s = self.settings
        if not s.speed_lengths:
            return []
        options = {
            "prefill_tokens": s.prefill_tokens, "decode_tokens": s.decode_tokens, "repeats": s.repeats,
            "read_tokens": s.read_tokens, "piece_tokens": s.piece_tokens, "seed": s.seed,
        }  # fmt: skip

        def measure() -> list[dict[str, Any]]:
            with self.bar(f"{name}: speed") as progress:
                return [_plain_speed(x) for x in measure_speed(model, s.speed_lengths, progress=progress, **options)]

        backends = [memory.backend for memory in model.memories()]
        key = key | {"machine": machine(model), "backends": backends, "lengths": s.speed_lengths, **options}
        return self.parts.get("speed", key, measure)


def _plain_lengths(found: LengthScores) -> dict[str, Any]:
    derived = ("perplexity", "bits_per_byte", "tail_perplexity", "tail_bits_per_byte")
    rows = [asdict(score) | {name: getattr(score, name) for name in derived} for score in found.scores]
    return {"lengths": rows, "positions": [b.to_dict() for b in found.positions], "faults": list(found.faults)}


def _plain_recall(size: int, found: Recall) -> dict[str, Any]:
    derived = {"exact_rate": found.exact_rate, "picked_rate": found.picked_rate}
    return {"size": size} | asdict(found) | derived


def _plain_speed(found: Speed) -> dict[str, Any]:
    rates = ("prefill_tokens_per_second", "decode_tokens_per_second")
    return asdict(found) | {name: getattr(found, name) for name in rates}


def _texts_fingerprint(texts: LongTexts) -> str:
    return fingerprint([str(texts.tokens.shape).encode(), texts.tokens, texts.num_bytes])


def _prompts_fingerprint(prompts: list[Prompt]) -> str:
    return fingerprint(array for p in prompts for array in (p.ids, p.choices, p.label.encode()))
