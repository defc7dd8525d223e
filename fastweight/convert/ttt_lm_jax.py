"""ttt-lm-jax: streaming checkpoints of the published JAX code (test-time-training/ttt-lm-jax), read without pickle.

The file is a run of msgpack arrays [path, bytes]; the bytes hold one array as flax packs it: extension type 1 around
(shape, dtype name, raw data in C order). A train state has its parameters under ("params", "params") and the step and
optimizer beside them; paths of a file of parameters start at "model". Sizes are read from the tensors; a JSON file says
the rest.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import torch
from torch import Tensor

from fastweight import files
from fastweight.configs import check_keys, require, to_json
from fastweight.convert.base import Format, keep_source, read_json, source_of
from fastweight.convert.folders import check_number
from fastweight.convert.ttt_names import Settings, fill, spread
from fastweight.model import Model

NAME = "ttt-lm-jax"
TRAIN_STATE, PARAMS, CONFIG = "streaming_train_state", "streaming_params", "jax_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
ARRAY = 1  # flax's extension type for arrays
READ_SIZE, LARGEST_RECORD = 1 << 24, (1 << 31) - 1

# Settings the tensors do not show: our name → (key, the code's default; None: it must be given).
KEYS: dict[str, tuple[str, float | None]] = {
    "base_lr": ("ttt_base_lr", None),
    "rope_base": ("rope_theta", 10000.0),
    "rms_norm_eps": ("rms_norm_eps", 1e-6),
    "init_std": ("initializer_range", 0.02),
}
# Keys that must agree with the tensors, if given.
CHECKED = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "hidden",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "mini_batch_size": "mini_batch_size",
    "pre_conv": "pre_conv",
    "conv_width": "conv_width",
    "tie_word_embeddings": "tied",
}
# Keys about training, memory and tokens; kept for export.
OTHER = (
    "max_sequence_length", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "ttt_base_lr_init", "ttt_base_lr_warmup", "remat_mini_batch_group_size", "remat_block",
    "remat_attention", "remat_mlp", "remat_conv", "scan_attention", "scan_mlp", "scan_query_chunk_size",
    "scan_key_chunk_size", "scan_mlp_chunk_size", "fcm_min_ratio", "fcm_max_ratio", "use_rotary_emb",
    "output_ttt_stats",
)  # fmt: skip
KIND = "seq_modeling_block"


def read(src: Path, config: Path | None) -> Model:
    """The model in a streaming file or the folder of one; settings from `config`, or from jax_config.json beside it."""
    file = _find(src)
    path = file.parent / CONFIG if config is None else config
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. The tensors do not tell the inner learning rate: write at least "
            f'{{"ttt_base_lr": 1.0}} (TTT-Linear; 0.1 for TTT-MLP) into a JSON file and give it with --config.'
        )
    data = read_json(path, "settings of the JAX model, at least ttt_base_lr")
    prefix, found = _read_params(file)
    settings = _to_settings(found, data, str(file), str(path))
    order = ["/".join(path) for path in found]
    model = fill(settings.to_config(), str(file), found, jax=True)
    return keep_source(model, NAME, {"config": data, "file": _plain_name(prefix), "order": order})


def write(model: Model, dst: Path) -> None:
    """Write the parameters as a streaming file, and jax_config.json beside it.

    A model that came from such a file gets the same records in the same order; the optimizer's are not kept.
    """
    settings, source = Settings.of(model.config, NAME), source_of(model, NAME)
    require(
        settings.gate == settings.share_qk,
        f"{NAME} has the gate and the shared q and k together or not at all; "
        f"this model has gate={settings.gate}, share_qk={settings.share_qk}.",
    )
    tensors = spread(model, jax=True)
    rank = {name: i for i, name in enumerate(source.get("order", []))}
    order = sorted(tensors, key=lambda path: rank.get("/".join(path), len(rank)))
    name = source.get("file", PARAMS)
    prefix = ("params", "params") if name == TRAIN_STATE else ()

    def write_records(temporary: Path) -> None:
        with temporary.open("wb") as out:
            for path in order:
                out.write(msgpack.Packer().pack([[*prefix, *path], _pack(tensors[path])]))

    files.write_atomically(dst / name, write_records)
    files.write_text(dst / CONFIG, to_json(_to_json(settings, source.get("config"))) + "\n")


def _find(src: Path) -> Path:
    """The streaming file: `src` itself, or the one in the folder `src`."""
    if src.is_file():
        return src
    found = [src / name for name in (TRAIN_STATE, PARAMS) if (src / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{src} holds neither {TRAIN_STATE} nor {PARAMS}.")
    require(len(found) == 1, f"{src} holds both {TRAIN_STATE} and {PARAMS}. Give the file that you mean.")
    return found[0]


def _plain_name(prefix: tuple[str, ...]) -> str:
    return TRAIN_STATE if prefix else PARAMS


def _read_params(file: Path) -> tuple[tuple[str, ...], dict[tuple[str, ...], Tensor]]:
    """The path prefix of the parameters (empty, or ("params", "params")) and the parameters by path below it."""
    found: dict[tuple[str, ...], Tensor] = {}
    prefixes: set[tuple[str, ...]] = set()
    with file.open("rb") as stream:
        for path, data in _records(stream, file):
            prefix = path[:2] if path[0] == "params" else ()
            path = path[len(prefix) :]
            require(path not in found, f"{file}: {'/'.join(path)} stands in it twice.")
            found[path] = _unpack(data, f"{file}: {'/'.join(path)}")
            prefixes.add(prefix)
    require(len(found) > 0, f"{file} holds no parameters (no path starts with params or model).")
    require(
        prefixes <= {("params", "params")} or prefixes == {()},
        f"{file}: parameters must all stand under params/params, or all start at model; found {sorted(prefixes)}.",
    )
    return prefixes.pop(), found


def _records(stream: BinaryIO, file: Path) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """(path, packed array) of each parameter record; step and optimizer records are stepped over, never decoded."""
    size = file.stat().st_size
    unpacker = msgpack.Unpacker(stream, read_size=READ_SIZE, max_buffer_size=LARGEST_RECORD)
    while unpacker.tell() < size:
        start = unpacker.tell()
        entries = _decode(unpacker.read_array_header, file, start)
        path: Any = _decode(unpacker.unpack, file, start) if entries == 2 else None
        good = isinstance(path, list) and len(path) > 0 and all(isinstance(part, str) for part in path)
        require(good, f"{file}: at byte {start} stands no [path, bytes] record; is this a streaming checkpoint?")
        if path[0] in ("step", "opt_state"):
            _decode(unpacker.skip, file, start)
            continue
        data = _decode(unpacker.unpack, file, start)
        require(isinstance(data, bytes), f"{file}: {'/'.join(path)} holds {type(data).__name__}, not bytes.")
        yield tuple(path), data


def _decode(read: Callable[[], Any], file: Path, start: int) -> Any:
    """One value of the stream; `start` is where its record begins."""
    try:
        return read()
    except msgpack.OutOfData:
        what = f"{file} is truncated: the record at byte {start} has no end. Fetch it again."
        raise ValueError(what) from None
    except (msgpack.UnpackException, ValueError) as error:
        what = f"{file} is damaged at byte {start}, or not a streaming checkpoint ({error or type(error).__name__})."
        raise ValueError(what) from error


def _unpack(data: bytes, what: str) -> Tensor:
    """The array in a record's bytes."""
    try:
        packed: Any = msgpack.unpackb(data)
        require(isinstance(packed, msgpack.ExtType) and packed.code == ARRAY, "not a plain array")
        entry: Any = msgpack.unpackb(packed.data)
        shape, dtype, raw = entry
        require(isinstance(raw, bytes) and all(isinstance(n, int) and n >= 0 for n in shape), "no shape and data")
    except (msgpack.UnpackException, TypeError, ValueError) as error:
        raise ValueError(f"{what} is damaged or of an unknown kind ({error}).") from error
    require(dtype in DTYPES, f"{what} has dtype {dtype!r}; parameters are {', '.join(DTYPES)}.")
    wanted = torch.Size(shape).numel() * DTYPES[dtype].itemsize
    require(len(raw) == wanted, f"{what} {list(shape)} {dtype} needs {wanted} bytes, has {len(raw)}.")
    return torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).view(shape)


def _pack(tensor: Tensor) -> bytes:
    """A record's bytes, exactly as flax packs an array."""
    name = next((name for name, dtype in DTYPES.items() if dtype == tensor.dtype), None)
    require(name is not None, f"{NAME} cannot hold {tensor.dtype}; convert the model to float32 or bfloat16.")
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    inner = msgpack.Packer().pack((tuple(tensor.shape), name, raw))
    return msgpack.Packer().pack(msgpack.ExtType(ARRAY, inner))


def _to_settings(found: dict[tuple[str, ...], Tensor], data: dict[str, Any], file: str, path: str) -> Settings:
    """Sizes from the tensors, the rest from the JSON file; where both speak, they must agree."""
    check_keys(path, data, [*(key for key, _ in KEYS.values()), *CHECKED, *OTHER, KIND], ["ttt_base_lr"])
    layer, mixer = ("model", "h", "0"), ("model", "h", "0", "seq_modeling_block")

    def size(at: tuple[str, ...], dim: int, default: int | None = None) -> int:
        if at not in found and default is not None:
            return default
        require(at in found, f"{file}: {'/'.join(at)} is missing, so the model's size is unknown.")
        require(found[at].dim() > dim, f"{file}: {'/'.join(at)} has shape {list(found[at].shape)}, which is too flat.")
        return found[at].shape[dim]

    numbers = {ours: check_number(f"{path}: {key}", float, data.get(key, value)) for ours, (key, value) in KEYS.items()}
    own_key = (*mixer, "wk", "kernel") in found
    settings = Settings(
        vocab_size=size(("model", "wte", "embedding"), 0),
        d_model=size(("model", "wte", "embedding"), 1),
        hidden=size((*layer, "feed_forward", "w1", "kernel"), 1),
        num_layers=len({at[2] for at in found if at[:2] == ("model", "h") and len(at) > 2}),
        num_heads=size((*mixer, "ttt_dense_0"), 0),
        mini_batch_size=size((*mixer, "learnable_token_idx"), 0),
        mlp=(*mixer, "ttt_dense_1") in found,
        share_qk=not own_key,
        gate=not own_key,
        pre_conv=(*layer, "conv", "conv1", "kernel") in found,
        conv_width=size((*layer, "conv", "conv1", "kernel"), 0, size((*mixer, "conv_q", "kernel"), 0, 4)),
        tied=("lm_head", "kernel") not in found,
        **numbers,
    )
    said = {key: (data[key], getattr(settings, ours)) for key, ours in CHECKED.items() if key in data}
    if KIND in data:
        said[KIND] = (data[KIND], _kind(settings))
    wrong = [f"{key} is {a!r}, the tensors say {b!r}" for key, (a, b) in said.items() if a != b]
    require(not wrong, f"{path} does not fit {file}: {'; '.join(wrong)}.")
    return settings


def _kind(settings: Settings) -> str:
    return f"ttt_{'mlp' if settings.mlp else 'linear'}{'' if settings.share_qk else '_base'}"


def _to_json(settings: Settings, original: dict[str, Any] | None) -> dict[str, Any]:
    """The original settings with this model's values; without an original, all that the JAX code needs."""
    own = {key: getattr(settings, ours) for key, ours in CHECKED.items()}
    own |= {key: getattr(settings, ours) for ours, (key, _) in KEYS.items()} | {KIND: _kind(settings)}
    if original is None:
        return own
    default = dict(KEYS.values())
    changed = {key: v for key, v in own.items() if key in original and original[key] != v}
    added = {key: own[key] for key, v in default.items() if key not in original and own[key] != v}
    return original | changed | added


FORMAT = Format(
    NAME, read, write, "TTT-Linear and TTT-MLP: streaming checkpoint of the JAX code (--config for settings)"
)
