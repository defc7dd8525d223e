"""Models that read a batch cut over processes, and the same in one process: how far results and gradients differ."""

from typing import Any

import torch
import torch.distributed as dist
from distributed import runs
from laws.cases import CASES
from tolerances import relative_error
from torch import Tensor

from fastweight import BlockConfig, FeedForwardConfig, Model
from fastweight.data import Batch
from fastweight.distributed.context import Context
from fastweight.presets import preset_names
from fastweight.state import tensors

LENGTH = 41  # odd, and more than two chunks of every case of the laws
DOCUMENTS = (0, 1, 8, 9, 47, 64, 75)  # one ends near the middle, one goes over it, some are shorter than a window


def case_model(name: str) -> Model:
    """Two blocks of a case of the laws, the first with a convolution before its mixer."""
    first, second = (
        BlockConfig(mixer=CASES[name], feed_forward=FeedForwardConfig(hidden=24), pre_conv=width) for width in (3, 0)
    )
    return runs.build(blocks=(first, second))


def preset_model(name: str) -> Model:
    torch.manual_seed(0)
    return Model.from_preset(name, vocab_size=257).double()


FEW = {  # for four processes, by the turns that a text makes
    1: ["tiny-hybrid", "attention-sinks"],
    2: ["tiny-hybrid", "attention-full", "lact-momentum", "liza-order3", "looped"],
}
PRESETS = [name for name in preset_names() if name.startswith("tiny-")]


def make(name: str) -> Model:
    if name == "looped":
        return runs.looped_model()
    return case_model(name) if name in CASES else preset_model(name)


def make_batch(packed: bool) -> Batch:
    """Two rows, or documents in one row."""
    generator = torch.Generator().manual_seed(5)
    shape = (1, DOCUMENTS[-1]) if packed else (2, LENGTH)
    tokens, targets = (torch.randint(0, 257, shape, generator=generator) for _ in range(2))
    targets[:, ::7] = -100
    weights = torch.rand(shape, generator=generator) * (targets >= 0)
    ends = torch.tensor(DOCUMENTS, dtype=torch.int32) if packed else None
    return Batch(tokens=tokens, targets=targets, target_bytes=(targets >= 0).long(), weights=weights, cu_seqlens=ends)


def read(model: Model, batch: Batch) -> tuple[Tensor, Any]:
    """Features and the state after the batch; adds the gradients of a fixed functional of the features."""
    features, state = model.features(batch.tokens, None, batch.cu_seqlens)
    weights = torch.stack([batch.targets, batch.targets**2 % 31], -1).double()  # of each token, wherever it is read
    (features[..., :2] * weights).sum().backward()
    return features.detach(), state


def difference(name: str, packed: bool, checkpointing: bool, turns: int) -> dict[str, float]:
    """The largest relative errors of features, gradients, and (of rows) the state after the last token."""
    context = Context(dist.group.WORLD, turns)
    model, batch = make(name), make_batch(packed)
    model.train()
    model.checkpointing = checkpointing
    features, state = read(model, batch)
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    part = context.cut(batch)
    with context.reading(model, part) as states:
        mine, _ = read(model, part.batch)
    context.sum_gradients(model.parameters())
    places = torch.arange(batch.tokens.numel()).view(batch.tokens.shape).expand_as(batch.tokens)
    own = context.cut(Batch(tokens=places, targets=places, target_bytes=places, cu_seqlens=batch.cu_seqlens)).batch
    wanted = features.flatten(0, 1)[own.tokens.flatten()]
    found = {"features": relative_error(mine.flatten(0, 1), wanted), "gradients": _gradients(model, gradients)}
    if not packed and context.part == context.parts - 1:
        after = dict(tensors(states[-1].visits))
        assert all(after[key].equal(value) for key, value in tensors(state.visits) if not value.is_floating_point())
        errors = [
            relative_error(after[key], value) for key, value in tensors(state.visits) if value.is_floating_point()
        ]
        found["state"] = max(errors)
    return found


def _gradients(model: Model, wanted: dict[str, Tensor]) -> float:
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(wanted), set(found) ^ set(wanted)
    sizes = {key: value.square().mean().sqrt().item() for key, value in wanted.items()}
    # A gradient that is itself rounding noise beside the others carries no information.
    return max(relative_error(found[k], v) for k, v in wanted.items() if sizes[k] > 1e-6 * max(sizes.values()))


def go_ahead() -> None:
    """Process 0 reads its part before process 1 begins; would it wait for it anywhere, both waited for ever."""
    context = Context(dist.group.WORLD)
    model, part = make("tiny-hybrid"), context.cut(make_batch(False))
    with torch.no_grad(), context.reading(model, part):
        if context.part == 1:
            dist.barrier()
        model.features(part.batch.tokens)
        if context.part == 0:
            dist.barrier()


def differences(names: list[str], turns: int) -> dict[str, dict[str, float]]:
    """`difference` of "NAME rows", and of "NAME packed" with activations computed again in the backward pass."""
    ways = {"rows": False, "packed": True}
    return {f"{name} {way}": difference(name, packed, packed, turns) for name in names for way, packed in ways.items()}
