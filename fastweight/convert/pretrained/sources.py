"""Where pretrained decoders come from: a folder, a name on the Hugging Face hub, a GGUF file."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastweight.configs import require
from fastweight.convert.base import read_json
from fastweight.convert.folders import read_weights

CONFIG = "config.json"
GENERATION = "generation_config.json"
PATTERNS = ["config.json", "model*.safetensors", "model.safetensors.index.json", GENERATION]
# What is kept in tokenizer/; how a model is to be sampled is said in ids of tokens, too.
TOKENIZER_FILES = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", GENERATION,
]  # fmt: skip
INSTALL = 'Install it with: pip install "fastweight[convert]"'
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Checkpoint(NamedTuple):
    """A config.json and the tensors that belong to it. name: for messages. generation: generation_config.json or {}."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    generation: dict[str, Any]


def read_checkpoint(source: str | Path, gguf_file: str | None) -> Checkpoint:
    """Everything of a folder, hub name or GGUF file, the tensors in the dtype of the file (float32 from GGUF)."""
    folder, gguf_file = locate(source, gguf_file, PATTERNS)
    if gguf_file is not None:
        return _read_gguf(folder / gguf_file)
    config = read_json(folder / CONFIG, 'the settings of a pretrained model ("model_type", "hidden_size", ...)')
    file = folder / GENERATION
    generation = read_json(file, "the settings of generation") if file.is_file() else {}
    return Checkpoint(str(folder), config, read_weights(folder), generation)


def locate(source: str | Path, gguf_file: str | None, patterns: list[str]) -> tuple[Path, str | None]:
    """The local folder of a source, and the name of the GGUF file in it if it is one.

    A hub name is fetched into the hub's own cache, only the files that `patterns` or gguf_file name.
    """
    path = Path(source)
    if gguf_file is None and path.suffix == ".gguf":
        path, gguf_file = path.parent, path.name
        require((path / gguf_file).is_file(), f"{source} does not exist. Give the path of a GGUF file.")
    if not path.is_dir():
        require(not path.exists(), f"{source} is a file. Give the folder with config.json and safetensors, or a .gguf.")
        path = _fetch(str(source), patterns if gguf_file is None else [gguf_file])
    found = gguf_file is None or (path / gguf_file).is_file()
    require(found, f"{source} holds no file {gguf_file}.")
    return path, gguf_file


def _fetch(name: str, patterns: list[str]) -> Path:
    """The files of a model on the hub, from its cache or the network."""
    neither = f"{name!r} is not a folder here, and "
    require(HUB_NAME.fullmatch(name) is not None, neither + 'not a hub name like "owner/model". Check the path.')
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(f"{neither}fetching it from the hub needs huggingface_hub. {INSTALL}") from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{neither}it could not be fetched from the Hugging Face hub ({type(error).__name__}: {reason}). Check the "
            "name and the network, or give a folder with config.json and safetensors."
        ) from error


def _read_gguf(path: Path) -> Checkpoint:
    """A GGUF file, dequantised to float32 and given the names of its family by transformers."""
    with gguf_support(path):
        lost = _lost_by_transformers(path)
    require(
        not lost,
        f"{path} says {', '.join(lost)}, which transformers does not read from GGUF: the model would compute something "
        "else. Load the same model from safetensors.",
    )
    with gguf_support(path) as transformers:
        import torch

        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    config = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
    for key in ("quantization_config", "_name_or_path"):  # of the file as it was; these tensors are floats
        config.pop(key, None)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:  # a tied head is the embedding once more
            tensors[name] = tensor.detach()
        seen.add(tensor.data_ptr())
    return Checkpoint(str(path), config, tensors, {})


def _lost_by_transformers(path: Path) -> list[str]:
    """What of a GGUF file changes the function, but is passed over when transformers makes a model of it."""
    import gguf  # pyright: ignore[reportMissingImports]

    reader = gguf.GGUFReader(path)
    fields = {name.split(".", 1)[-1]: field.contents() for name, field in reader.fields.items() if "rope" in name}
    windows = {n: f.contents() for n, f in reader.fields.items() if n.endswith("attention.sliding_window")}
    lost = [tensor.name for tensor in reader.tensors if tensor.name.startswith(("rope_freqs", "rope_factors"))]
    lost += [f"rope.scaling.type {fields['rope.scaling.type']!r}"] if _on(fields.get("rope.scaling.type")) else []
    lost += [f"rope.scale_linear {fields['rope.scale_linear']}"] if fields.get("rope.scale_linear", 1) != 1 else []
    return lost + [f"{n} {value}" for n, value in windows.items() if value and not n.startswith("gemma")]


def _on(scaling: Any) -> bool:
    return scaling not in (None, "", "none")


@contextlib.contextmanager
def gguf_support(path: Path) -> Iterator[Any]:
    """The transformers library, which reads GGUF; says what is missing, and which file could not be read."""
    try:
        import gguf  # noqa: F401  # pyright: ignore[reportMissingImports]
        import transformers
    except ImportError as error:
        raise ImportError(f"reading {path} needs transformers and gguf ({error}). {INSTALL}") from error
    try:
        yield transformers
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes its readers fail in many ways
        raise ValueError(f"{path}: transformers cannot read this GGUF file ({error}).") from error
