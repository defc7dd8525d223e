"""The tensors of a pretrained decoder into a Model, and back bit for bit."""

import base64
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastweight.configs import require
from fastweight.convert.folders import same_bytes, skeleton
from fastweight.convert.pretrained.family import Family
from fastweight.convert.pretrained.names import Entry, entries
from fastweight.model import Model, check_weights
from fastweight.model_config import ModelConfig

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = {str(d).removeprefix("torch."): d for d in (*FLOATS, torch.bool, torch.uint8, torch.int32, torch.int64)}
LARGEST_CONSTANT = 1 << 16  # bytes of a stored constant that is kept as it is


class Stored(NamedTuple):
    """How a checkpoint holds what a Model holds otherwise, as JSON values.

    prefix: of its names, "" where the family's is left out. head: the name of its output layer. head_too: it is stored
    although it is tied. dtype: of its weights.
    constants: its tensors that are no weights, by name.
    """

    prefix: str
    head: str
    head_too: bool
    dtype: str
    constants: dict[str, Any]

    @staticmethod
    def of(data: Any) -> "Stored":
        """From its JSON form, which may have been damaged since."""
        keys = set(Stored._fields)
        good = isinstance(data, dict) and data.keys() == keys and data["dtype"] in DTYPES
        require(good, f"the model's origin must say {', '.join(sorted(keys))} of its checkpoint, got {data!r}.")
        return Stored(**data)


def read(
    family: Family, config: ModelConfig, found: dict[str, Tensor], source: str, dtype: torch.dtype | None
) -> tuple[Model, Stored]:
    """The model with the tensors `found`, which must be all of its own and no other. `found` is emptied."""
    model = skeleton(config)
    table = _table(family, model)
    prefix = _prefix(family, found)
    head = family.old_head if family.old_head in found else family.head
    found_names = {family.head if n == head else family.prefix + n.removeprefix(prefix): n for n in found}
    constants = {n: _describe(n, found.pop(n)) for n in list(found) if n.endswith(family.ignored)}
    found_names = {theirs: name for theirs, name in found_names.items() if name in found}
    head_too = _take_tied_head(family, model, found, found_names, source)
    wanted = {theirs: tuple(t.shape) for entry in table for theirs, t in entry.write(model.state_dict()).items()}
    check_weights(source, {theirs: found[name] for theirs, name in found_names.items()}, wanted)
    stored = Stored(prefix, head, head_too, str(_dtype(found, source, dtype)).removeprefix("torch."), constants)
    weights: dict[str, Tensor] = {}
    for entry in table:
        parts = [found.pop(found_names[theirs]) for theirs in entry.theirs]
        weights |= entry.read([part if dtype is None else part.to(dtype) for part in parts])
    model.load_state_dict(weights, assign=True)
    return model, stored


def write(family: Family, model: Model, stored: Stored) -> dict[str, Tensor]:
    """The tensors under their names in the checkpoint, on the CPU, in its dtype where that loses nothing."""
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    dtype = DTYPES[stored.dtype]
    if all(_fits(tensor, dtype) for tensor in weights.values()):
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    found: dict[str, Tensor] = {}
    for entry in _table(family, model):
        found |= entry.write({name: weights[name] for name in entry.ours})
    if stored.head_too:
        found[family.head] = weights["embedding.weight"].clone()
    prefix = stored.prefix
    found = {stored.head if n == family.head else prefix + n.removeprefix(family.prefix): t for n, t in found.items()}
    return found | {name: _restore(told) for name, told in stored.constants.items()}


def _table(family: Family, model: Model) -> list[Entry]:
    return entries(model, family.outside, family.inside, family.layers)


def _prefix(family: Family, found: dict[str, Tensor]) -> str:
    """The family's prefix, or nothing if no tensor of the file has it."""
    return family.prefix if any(name.startswith(family.prefix) for name in found) else ""


def _take_tied_head(
    family: Family, model: Model, found: dict[str, Tensor], found_names: dict[str, str], source: str
) -> bool:
    """Drop a head that is the embedding once more; whether there was one."""
    if model.head is not None or family.head not in found_names:
        return False
    head, embedding = found.pop(found_names.pop(family.head)), _embedding_name(family)
    same = embedding in found_names and same_bytes(head, found[found_names[embedding]])
    require(same, f"{source}: {family.head} differs from {embedding}, but tie_word_embeddings is true.")
    return True


def _embedding_name(family: Family) -> str:
    return next(f"{rule.theirs[0]}.weight" for rule in family.outside if rule.ours == ("embedding",))


def _dtype(found: dict[str, Tensor], source: str, wanted: torch.dtype | None) -> torch.dtype:
    """The one dtype of the weights."""
    dtypes = {tensor.dtype: name for name, tensor in found.items()}
    for dtype, name in dtypes.items():
        require(dtype in FLOATS, f"{source}: {name} is {dtype}. Weights must be floats that have not been quantised.")
    require(
        len(dtypes) == 1 or wanted is not None,
        f"{source} mixes {', '.join(f'{d} ({n})' for d, n in dtypes.items())}. Give dtype to make them one.",
    )
    widest = next(iter(dtypes))
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype or same_bytes(tensor.to(dtype).to(tensor.dtype), tensor)


def _describe(name: str, tensor: Tensor) -> dict[str, Any]:
    """A constant as JSON: a causal mask by its size, anything small by its bytes."""
    told = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    require(told["dtype"] in DTYPES, f"{name} is {tensor.dtype}, which no constant of this family is.")
    if tensor.dim() == 4 and same_bytes(tensor, _causal(told)):
        return told
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    require(len(data) <= LARGEST_CONSTANT, f"{name} {told['shape']} should be a causal mask, but is not.")
    return told | {"base64": base64.b64encode(data).decode()}


def _restore(told: dict[str, Any]) -> Tensor:
    if "base64" not in told:
        return _causal(told)
    data = torch.frombuffer(bytearray(base64.b64decode(told["base64"])), dtype=torch.uint8)
    return data.view(DTYPES[told["dtype"]]).reshape(told["shape"])


def _causal(told: dict[str, Any]) -> Tensor:
    return torch.ones(told["shape"], dtype=torch.uint8).tril().to(DTYPES[told["dtype"]])
