"""Which group each tensor of a model belongs to: its kind of module decides, not a list of names."""

from torch import nn

from fastweight.layers import FeedForward
from fastweight.model import Model

GATE_RATIO = 4
REST_GROUP = "rest"


def tensor_groups(model: Model) -> dict[str, str]:
    """The group of every tensor of `model.state_dict()`, in its order.

    "embedding": embeddings and the head. "mlp": the linear layers of feed-forwards. "attention": those of mixers, of
    whatever kind. "gates": linear layers of mixers with less than a quarter as many outputs as inputs (rates, gates per
    head). "rest": all others: norms, biases, convolutions, the memories' own initial weights.
    """
    found = dict.fromkeys(model.state_dict(), REST_GROUP)
    for owner, part in model.named_modules():
        group = _group(owner, part, model)
        if group is not None:
            found[f"{owner}.weight"] = group
    return found


def _group(name: str, part: nn.Module, model: Model) -> str | None:
    if isinstance(part, nn.Embedding) or part is model.head:
        return "embedding"
    if not isinstance(part, nn.Linear):
        return None
    if _inside(name, model, FeedForward):
        return "mlp"
    narrow = part.out_features * GATE_RATIO < part.in_features
    return "gates" if narrow else "attention"


def _inside(name: str, model: Model, kind: type[nn.Module]) -> bool:
    owners = name.split(".")
    return any(isinstance(model.get_submodule(".".join(owners[:i])), kind) for i in range(1, len(owners)))
