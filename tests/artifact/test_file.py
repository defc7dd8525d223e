"""The file: what is read back is what was packed, also in another process; and every damage is noticed."""

import hashlib
import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from fastweight.artifact import (
    ArtifactError,
    LowRankSpec,
    PackSpec,
    collect_hessians,
    describe,
    pack,
    unpack,
    unpack_tokenizer,
    write,
)
from fastweight.artifact.file import DIGEST_BYTES, HEAD, MAGIC, join, split
from fastweight.artifact.quantise import make_solvers, quantise
from fastweight.data import BPETokenizer, ByteTokenizer
from fastweight.evaluate import score
from fastweight.model import Model
from fastweight.model_config import ModelConfig

SPEC = PackSpec(low_rank=LowRankSpec(rank=2, tensors=2))


def batches() -> list[torch.Tensor]:
    return [torch.randint(0, 257, (3, 40), generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model(attention=True)


@pytest.fixture(scope="module")
def hessians(model):
    return collect_hessians(model, batches())


@pytest.fixture(scope="module")
def data(model, hessians) -> bytes:
    return pack(model, SPEC, hessians=hessians, tokenizer=ByteTokenizer())


def documents() -> list:
    tokens = np.random.default_rng(0).integers(0, 256, 300)
    return [(tokens, np.ones_like(tokens))]


FRESH = """
import hashlib, json, sys
import numpy as np
from fastweight.artifact import unpack
from fastweight.evaluate import score
model = unpack(sys.argv[1])
tokens = np.random.default_rng(0).integers(0, 256, 300)
found = {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in model.state_dict().items()}
print(json.dumps([found, score(model, [(tokens, np.ones_like(tokens))]).bits_per_byte]))
"""


def test_golf_p9_a_fresh_process_reads_the_same_bits_and_scores_the_same(tmp_path, model, hessians, data):
    write(tmp_path / "model.fwa", data)
    command = [sys.executable, "-c", FRESH, str(tmp_path / "model.fwa")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found, bits_per_byte = json.loads(done.stdout)
    in_memory = tiny_model(attention=True)
    quantised = quantise(model, SPEC, make_solvers(SPEC, hessians))
    in_memory.load_state_dict({name: stored.value() for name, stored in quantised.items()})
    wanted = {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in in_memory.state_dict().items()}
    assert found == wanted
    assert bits_per_byte == score(in_memory, documents()).bits_per_byte


def test_golf_p9_equal_weights_give_equal_bytes(hessians, data):
    assert pack(tiny_model(attention=True), SPEC, hessians=hessians, tokenizer=ByteTokenizer()) == data


def test_golf_p9_code_and_file_together_are_held_against_the_cap(data):
    report = describe(data, cap_bytes=16_000_000, program_bytes=40_000)
    assert report.margin_bytes == 16_000_000 - 40_000 - len(data)


def test_every_byte_of_the_file_is_accounted_for(data):
    report = describe(data)
    parts = sum(t.bytes for t in report.tensors) + report.tokenizer_bytes + report.head_bytes
    assert parts == pytest.approx(len(data), abs=1e-6)
    assert sum(group.bytes for group in report.groups) == pytest.approx(sum(t.bytes for t in report.tensors))
    assert report.weights == tiny_model(attention=True).num_parameters


def test_the_config_and_the_origin_come_back(hessians):
    model = tiny_model(attention=True)
    model.origin = {"family": "somewhere", "config": {"a": 1}}
    again = unpack(pack(model, SPEC, hessians=hessians))
    assert again.config == model.config
    assert again.origin == model.origin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_model_keeps_its_dtype(dtype):
    model = tiny_model().to(dtype)
    again = unpack(pack(model, PackSpec(method="nearest")))
    assert {t.dtype for t in again.state_dict().values()} == {dtype}


def test_small_tensors_come_back_as_float16_or_exactly():
    model = tiny_model()
    exact = unpack(pack(model, PackSpec(method="nearest", rest="float32")))
    rounded = unpack(pack(model, PackSpec(method="nearest")))
    name = "blocks.0.mixer.log_rate"
    assert torch.equal(exact.get_parameter(name), model.get_parameter(name))
    assert torch.equal(rounded.get_parameter(name), model.get_parameter(name).half().float())


def test_a_small_tensor_beyond_float16_is_kept_in_float32():
    model = tiny_model()
    model.norm.weight.data[3] = 1e6
    assert unpack(pack(model, PackSpec(method="nearest"))).norm.weight[3] == 1e6


def test_the_tokenizer_travels_in_the_file(data):
    assert unpack_tokenizer(data) == ByteTokenizer()
    trained = BPETokenizer.train(["some words and some more words " * 30], 270)
    again = unpack_tokenizer(pack(tiny_model(), PackSpec(method="nearest"), tokenizer=trained))
    assert again is not None
    assert again.hash == trained.hash
    assert unpack_tokenizer(pack(tiny_model(), PackSpec(method="nearest"))) is None


def test_gptq_without_hessians_says_where_to_get_them(model):
    with pytest.raises(ValueError, match="needs Hessians. Give hessians=collect_hessians"):
        pack(model, PackSpec())


def test_weights_that_are_not_finite_are_refused_by_name():
    model = tiny_model()
    model.blocks[1].feed_forward.up.weight.data[2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.feed_forward\.up\.weight hold.s. values that are not finite"):
        pack(model, PackSpec(method="nearest"))


def test_a_model_with_further_tensors_is_refused():
    model = tiny_model()
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"merge adapters first.*unexpected extra\.weight"):
        pack(model, PackSpec(method="nearest"))


def regions(data: bytes) -> dict[str, int]:
    """A byte of every part of the file."""
    manifest = HEAD.unpack_from(data)[2]
    payload, end = HEAD.size + manifest, len(data) - DIGEST_BYTES
    inside = {f"payload {i}/8": payload + (end - 1 - payload) * i // 8 for i in range(9)}
    return {"magic": 2, "version": 8, "manifest size": 12, "file size": 18, "manifest": HEAD.size + 9, **inside,
            "last of manifest": payload - 1, "checksum": end, "last byte": len(data) - 1}  # fmt: skip


REGIONS = ("magic", "version", "manifest size", "file size", "manifest", "last of manifest", "checksum", "last byte",
           *(f"payload {i}/8" for i in range(9)))  # fmt: skip


@pytest.mark.parametrize("region", REGIONS)
def test_golf_p9_a_changed_byte_anywhere_is_refused(data, region):
    changed = bytearray(data)
    changed[regions(data)[region]] ^= 0x10
    with pytest.raises(ArtifactError):
        unpack(bytes(changed))


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 20, 24, 100, -33, -1])
def test_golf_p9_a_file_that_was_cut_short_is_refused(tmp_path, data, kept):
    (tmp_path / "cut").write_bytes(data[:kept])
    with pytest.raises(ArtifactError, match="truncated|no packed model"):
        unpack(tmp_path / "cut")


def test_a_file_that_goes_on_too_long_is_refused(data):
    with pytest.raises(ArtifactError, match="too long"):
        unpack(data + b"x")


def test_another_version_is_named(data):
    changed = HEAD.pack(MAGIC, 7, *HEAD.unpack_from(data)[2:]) + data[HEAD.size :]
    with pytest.raises(ArtifactError, match="version 7; this library reads version 1"):
        unpack(changed)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="nowhere: no such file"):
        unpack(tmp_path / "nowhere")


def test_bytes_that_are_no_packed_model_are_not_written(tmp_path, data):
    write(tmp_path / "file", data)
    with pytest.raises(ArtifactError):
        write(tmp_path / "file", data[:-1])
    assert (tmp_path / "file").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def edited(data: bytes, change) -> bytes:
    """The file with another manifest and a checksum that fits: what a forger would make."""
    manifest, payload, _ = split(data)
    change(manifest)
    return join(manifest, payload)


def set_to(*path, value):
    def change(manifest):
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return change


def signed(change):
    """Change the config and sign it again."""

    def both(manifest):
        change(manifest)
        manifest["signature"] = ModelConfig.from_dict(manifest["config"]).signature

    return both


FORGERIES = {
    "format": (set_to("format", value="x"), "its format is 'x'"),
    "config": (set_to("config", "d_model", value=32), "signature"),
    "wider": (signed(set_to("config", "d_model", value=32)), "contradicts itself"),
    "bomb": (signed(set_to("config", "vocab_size", value=10**12)), "at most 2,147,483,648 are read here"),
    "overflow": (signed(set_to("config", "vocab_size", value=2**62)), "contradicts itself"),
    "key": (lambda m: m.update(extra=1), "unknown key 'extra'"),
    "no tensors": (set_to("tensors", value=[]), "must list the"),
    "name": (set_to("tensors", 0, "name", value="x"), "has 'x' in its place"),
    "bits": (set_to("tensors", 0, "bits", value=9), "9 bits; 4 to 8 are possible"),
    "bits as text": (set_to("tensors", 0, "bits", value="6"), "bits"),
    "fewer bits": (set_to("tensors", 0, "bits", value=4), "is possible"),
    "dtype": (set_to("tensors", 0, "dtype", value="int8"), "unknown dtype 'int8'"),
    "group": (set_to("tensors", 0, "group", value="x"), "unknown group"),
    "tensor": (set_to("tensors", 0, value=None), "is no object"),
    "kept matrix": (set_to("tensors", 0, value={"name": "embedding.weight", "group": "rest", "dtype": "float32",
                                                "stored": "float32"}), "coded stream"),
    "size": (set_to("plain", "size", value=1), "its parts"),
    "negative size": (set_to("plain", "size", value=-1), "negative"),
    "part": (set_to("codes", "parts", 0, value=["raw", 10**15]), "its parts need"),
    "coder": (set_to("codes", "parts", 0, value=["pickle", 1]), "unknown coder 'pickle'"),
    "section": (set_to("codes", value=None), "damaged"),
    "file name": (set_to("tokenizer", "files", value=[["../../evil", 3]]), "cannot be '../../evil'"),
    "parent folder": (set_to("tokenizer", "files", value=[["..", 3]]), "cannot be '..'"),
    "long name": (set_to("tokenizer", "files", value=[["a" * 300, 3]]), "cannot be 'aaa"),
    "endless loops": (set_to("config", "loops", value=[0, 1, 10**12]), "1000000000000 times"),
    "file size": (set_to("tokenizer", "files", 0, 1, value=10**12), "its tokenizer has"),
    "hash": (set_to("tokenizer", "hash", value="0"), "do not make the tokenizer"),
    "origin": (set_to("origin", value=3), "its origin is no object"),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_manifest_that_contradicts_the_file_is_refused_though_its_checksum_fits(data, forgery):
    change, message = FORGERIES[forgery]
    with pytest.raises(ArtifactError, match=message):
        unpack(edited(data, change))


def test_a_file_that_is_much_longer_than_its_head_says_is_not_read(data, tmp_path):
    path = tmp_path / "model.fwa"
    path.write_bytes(data)
    os.truncate(path, 1 << 40)  # it takes no room on the disk
    with pytest.raises(ArtifactError, match="too long"):
        unpack(path)


def test_the_number_of_parameters_can_be_bounded(data):
    with pytest.raises(ArtifactError, match="at most 1,000 are read here"):
        unpack(data, max_parameters=1000)


def test_no_change_of_the_payload_gets_past_with_another_error(data):
    """With a checksum that fits, a changed step or small tensor cannot be told; what is told is an ArtifactError."""
    manifest, payload, _ = split(data)
    rng, refused = np.random.default_rng(0), 0
    for place in rng.integers(0, len(payload), 40).tolist():
        changed = bytearray(payload)
        changed[place] ^= 1 << int(rng.integers(8))
        try:
            unpack(join(manifest, bytes(changed)))
        except ArtifactError:
            refused += 1
    assert refused > 10  # what is coded by rANS notices; brotli and plain bytes need not


def test_a_manifest_that_unpacks_to_too_much_is_refused():
    packed = zlib.compress(b"[" * (1 << 24), 9)
    size = HEAD.size + len(packed) + DIGEST_BYTES
    body = HEAD.pack(MAGIC, 1, len(packed), size) + packed
    with pytest.raises(ArtifactError, match="cut short or too large"):
        unpack(body + hashlib.sha256(body).digest())


def test_a_manifest_that_nests_too_deeply_is_refused():
    packed = zlib.compress(b"[" * 100_000, 9)
    size = HEAD.size + len(packed) + DIGEST_BYTES
    body = HEAD.pack(MAGIC, 1, len(packed), size) + packed
    with pytest.raises(ArtifactError, match="cannot be read"):
        unpack(body + hashlib.sha256(body).digest())
