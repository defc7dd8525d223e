"""Attention transfer: each layer's linear branch learns what its own softmax branch says, layers independent."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.configs import require
from fastweight.convert.mag import backbone_view, liza_layers
from fastweight.data import IGNORED, Batch
from fastweight.mixers.liza import Liza
from fastweight.model import Model
from fastweight.state import ModelState
from fastweight.train.config import ObjectiveConfig
from fastweight.train.loss import autocast, score_batch
from fastweight.train.teacher import teacher_view

SMALLEST_ENERGY = 1e-12


class Transfer:
    """Per token ‖student − softmax‖² / ‖softmax‖² over all heads, or 1 − cosine per head, before the output projection.

    Every layer reads the hidden states of the frozen backbone, so no layer's error disturbs another's lesson, and one
    layer's activations are held at a time. The gradient is that of the sum over layers, the reported loss the mean.
    Sums: cross-entropy of the text in nats (0 in training), loss, squared error of each visited layer.
    Source: Zhang et al. 2024 (LoLCATs), arXiv:2410.10254, section 3.2, here relative to the teacher's energy.
    """

    reads_text = False

    def __init__(self, model: Model, config: ObjectiveConfig, precision: str):
        self.model, self.config, self.precision = model, config, precision
        self.mixers = liza_layers(model)
        self.blocks = [block for block in model.config.visits if block in self.mixers]
        kinds = ", ".join(sorted({mixer.kind for mixer in model.mixers()}))
        require(
            bool(self.blocks),
            f'objective "transfer" needs layers with a softmax and a linear branch (liza), this model has {kinds}. '
            "Convert it first: titanize(model).",
        )

    def totals(self, batches: Sequence[Batch]) -> list[float]:
        return []

    def learn(
        self, batch: Batch, state: ModelState | None, num_targets: int, totals: Sequence[float] = ()
    ) -> tuple[Tensor, ModelState | None]:
        losses, errors = [], []
        for mixer, x in self._consume(self._inputs(batch)):
            loss, error = self._errors(mixer, x, batch)
            require(
                loss.requires_grad,
                'objective "transfer": a layer\'s loss depends on no trained parameter. Train "memory", and with '
                'student "mix" set a mag weight above 0.',
            )
            (loss / num_targets).backward()
            losses.append(loss.detach())
            errors.append(error.detach())
        return self._sums(torch.zeros_like(losses[0]), losses, errors), None

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        pairs = [self._errors(mixer, x, batch) for mixer, x in self._consume(self._inputs(batch))]
        losses, errors = ([pair[i] for pair in pairs] for i in (0, 1))
        return self._sums(score_batch(self.model, batch, self.precision), losses, errors)

    def describe(self, means: Sequence[float]) -> dict[str, Any]:
        """transfer_error: the relative squared error of each visited layer, by block."""
        errors = zip(self.blocks, means[1:], strict=True)
        return {"loss": means[0], "transfer_error": [{"block": block, "error": error} for block, error in errors]}

    @staticmethod
    def _sums(nats: Tensor, losses: list[Tensor], errors: list[Tensor]) -> Tensor:
        return torch.stack([nats, torch.stack(losses).mean().to(nats.dtype), *errors])

    @staticmethod
    def _consume(inputs: list[tuple[Liza, Tensor]]) -> Iterator[tuple[Liza, Tensor]]:
        """Yield from the front, letting go of what was read."""
        inputs.reverse()
        while inputs:
            yield inputs.pop()

    @torch.no_grad()
    def _inputs(self, batch: Batch) -> list[tuple[Liza, Tensor]]:
        """(mixer, its input [B, T, D]) of each visit in the frozen backbone."""
        caught: list[tuple[Any, Tensor]] = []
        handles = [
            mixer.register_forward_pre_hook(lambda module, args: caught.append((module, args[0])))
            for mixer in self.mixers.values()
        ]
        try:
            with teacher_view(self.model), autocast(batch.tokens.device, self.precision):
                self.model.features(batch.tokens, None, batch.cu_seqlens)
        finally:
            for handle in handles:
                handle.remove()
        return caught

    def _errors(self, mixer: Liza, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss, relative squared error) of one layer, sums over the places that have a target."""
        with autocast(x.device, self.precision):
            teacher, student = self._heads(mixer, x, batch.cu_seqlens)
        wide = torch.promote_types(teacher.dtype, torch.float32)
        teacher, student = teacher.to(wide), student.to(wide)
        ignored = batch.targets == IGNORED
        error = relative_error(student, teacher).masked_fill(ignored, 0).sum()
        loss = self.config.mse * error
        if self.config.cosine:
            angle = 1 - F.cosine_similarity(student, teacher, dim=-1).mean(-1)
            loss = loss + self.config.cosine * angle.masked_fill(ignored, 0).sum()
        return loss, error

    def _heads(self, mixer: Liza, x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Heads [B, T, heads, head_dim] of the teacher and of what learns from it."""
        if self.config.student == "linear":
            return mixer.transfer_outputs(x, cu_seqlens)
        with torch.no_grad(), backbone_view(self.model):
            teacher = _merged_heads(mixer, x, cu_seqlens)
        return teacher, _merged_heads(mixer, x, cu_seqlens)


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """‖student − teacher‖² / ‖teacher‖² over the heads [B, T, heads, head_dim] of each token → [B, T]."""
    energy = teacher.square().sum((-2, -1)).clamp_min(SMALLEST_ENERGY)
    return (student - teacher).square().sum((-2, -1)) / energy


def _merged_heads(mixer: Liza, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """What the layer's output projection reads, from an empty state: [B, T, heads, head_dim]."""
    caught: list[Tensor] = []
    handle = mixer.out.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    try:
        count = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        mixer(x, mixer.init_state(count), cu_seqlens=cu_seqlens)
    finally:
        handle.remove()
    return caught[0].unflatten(-1, (mixer.config.num_heads, -1))
