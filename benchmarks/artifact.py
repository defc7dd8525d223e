"""Quantising and packing: seconds for a model of 36 million weights, speed and loss of the coder, bits per weight."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro

from benchmarks.timing import machine, print_table, write_json
from fastweight import BlockConfig, FeedForwardConfig, Model, ModelConfig
from fastweight.artifact import PackSpec, collect_hessians, describe, unpack
from fastweight.artifact.coders import compress
from fastweight.artifact.entropy import Part, decode, encode, part_entropy_bits
from fastweight.artifact.pack import encode as encode_model
from fastweight.artifact.quantise import make_solvers, quantise
from fastweight.artifact.rows import Rows, dequantise, nearest, row_scales
from fastweight.mixers.attention import AttentionConfig

QUANTISERS = ((6, 2.5), (6, 12.85), (8, 20.0), (7, 15.0), (5, 6.4), (4, 3.2))


def record_shape(blocks: int = 11, d_model: int = 512, vocab_size: int = 8192) -> ModelConfig:
    """11 blocks of width 512 with 8192 tied embeddings: 35.9 million weights; blocks 3 to 5 are visited three times."""
    mixer = AttentionConfig(num_heads=8, num_kv_heads=4, qk_norm="head")
    block = BlockConfig(mixer=mixer, feed_forward=FeedForwardConfig(kind="relu2", hidden=4 * d_model))
    order = (*range(3), *(3, 4, 5) * 3, *range(6, blocks)) if blocks > 6 else None
    return ModelConfig(
        vocab_size=vocab_size, d_model=d_model, blocks=(block,) * blocks, order=order, tie_embeddings=True
    )


class Seconds(NamedTuple):
    """wall: by the clock. processor: what this process had of it; on a busy machine the fairer figure."""

    wall: float
    processor: float


def timed(run: Callable[[], Any]) -> tuple[Seconds, Any]:
    """Seconds and result of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    found = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor), found


def whole_model(device: str, calibration_tokens: int) -> dict[str, Any]:
    """Calibrate, quantise, pack and read back a model of the record's shape with random weights."""
    torch.manual_seed(0)
    model, spec = Model(record_shape()).to(device), PackSpec()
    tokens = torch.randint(0, model.config.vocab_size, (max(1, calibration_tokens // 512), 512))
    seconds: dict[str, Seconds] = {}
    seconds["hessians"], hessians = timed(lambda: collect_hessians(model, tokens.split(4)))
    seconds["factor"], solvers = timed(lambda: make_solvers(spec, hessians))
    seconds["gptq"], quantised = timed(lambda: quantise(model, spec, solvers))
    seconds["code"], data = timed(lambda: encode_model(model, spec, quantised))
    seconds["unpack"], again = timed(lambda: unpack(data))
    wrong = [n for n, t in again.state_dict().items() if not torch.equal(t, quantised[n].value())]
    if wrong:
        raise SystemExit(f"read back differently: {', '.join(wrong)}")
    report = describe(data)
    print(report.table(), flush=True)
    packing = [seconds[name] for name in ("factor", "gptq", "code")]
    seconds["factor + gptq + code"] = Seconds(sum(s.wall for s in packing), sum(s.processor for s in packing))
    return {"weights": report.weights, "bytes": len(data), "seconds": {n: s._asdict() for n, s in seconds.items()},
            "calibration_tokens": tokens.numel(), "report": report.to_dict()}  # fmt: skip


def gaussian_codes(bits: int, clip: float, rows: int, columns: int) -> tuple[np.ndarray, float]:
    """Symbols of i.i.d. Gaussian weights, and the mean squared error relative to their variance."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    qmax = (1 << (bits - 1)) - 1
    scales = row_scales(weight, clip, qmax)
    codes = nearest(weight, scales, qmax)
    error = float((dequantise(Rows(codes, scales)) - weight).square().mean() / weight.square().mean())
    return (codes.short() + qmax).to(torch.uint8).numpy(), error


def coder_rates(rows: int = 2048, columns: int = 512) -> list[dict[str, Any]]:
    """Bits per weight of every coder on Gaussian codes, and what rANS costs beyond the entropy."""
    found = []
    for bits, clip in QUANTISERS:
        symbols, error = gaussian_codes(bits, clip, rows, columns)
        data = symbols.tobytes()
        rates = {coder: 8 * len(compress(coder, data)) / len(data) for coder in ("zstd", "brotli")}
        entropy = part_entropy_bits(Part(symbols)) / len(data)
        rates["rans"] = 8 * len(encode([Part(symbols)], ("rans",))[1]) / len(data)
        found.append({"bits": bits, "clip": clip, "entropy": entropy, **rates, "relative_error": error})
    return found


def rans_speed(symbols_millions: int) -> dict[str, float]:
    """Megabytes (one byte per symbol) per second both ways, and the gap to the entropy."""
    symbols, _ = gaussian_codes(6, 12.85, symbols_millions * 1000, 1000)
    part = Part(symbols)
    encode_seconds, (record, data) = timed(lambda: encode([part], ("rans",)))
    decode_seconds, (again,) = timed(lambda: decode(data, record, [symbols.shape], [None]))
    if not np.array_equal(again, symbols):
        raise SystemExit("rANS read back something else")
    entropy = part_entropy_bits(part) / 8
    megabytes = symbols.size / 1e6
    speeds = {
        f"{way}_mb_per_{kind}_second": megabytes / getattr(seconds, kind)
        for way, seconds in (("encode", encode_seconds), ("decode", decode_seconds))
        for kind in Seconds._fields
    }
    return {"megabytes": megabytes, **speeds, "gap": len(data) / entropy - 1}


def main(
    device: str = "cpu", calibration_tokens: int = 4096, symbols_millions: int = 16, json: Path | None = None
) -> None:
    """Print the tables.

    Args:
        device: Where calibration and GPTQ run; coding is always on the CPU.
        calibration_tokens: Read for the Hessians.
        symbols_millions: Length of the stream whose speed is measured.
        json: Also write all numbers to this file.
    """
    speed = rans_speed(symbols_millions)
    ways = [f"{way}_mb_per_{kind}_second" for way in ("encode", "decode") for kind in Seconds._fields]
    columns = ["MB", *("encode, MB/s", "MB/s of processor", "decode, MB/s", "MB/s of processor"), "above entropy"]
    figures = [f"{speed['megabytes']:.0f}", *(f"{speed[way]:.1f}" for way in ways), f"{speed['gap']:.3%}"]
    print_table("rANS on Gaussian codes (int6, clip 12.85), numpy, one thread", columns, [figures])
    rates = coder_rates()
    names = ["entropy", "zstd", "brotli", "rans"]
    rows = [
        [f"int{r['bits']} k={r['clip']}", *(f"{r[n]:.3f}" for n in names), f"{r['relative_error']:.4f}"] for r in rates
    ]
    print_table("Bits per weight, i.i.d. Gaussian, 2048 × 512", ["quantiser", *names, "relative MSE"], rows)
    print()
    whole = whole_model(device, calibration_tokens)
    rows = [[name, f"{s['wall']:.1f}", f"{s['processor']:.1f}"] for name, s in whole["seconds"].items()]
    about = machine(device)
    title = f"{whole['weights']:,} weights, {whole['bytes']:,} bytes, {about['device']}"
    print_table(title, ["step", "s", "s of processor"], rows)
    write_json(json, {"machine": about, "rans": speed, "coders": rates, "model": whole})


if __name__ == "__main__":
    tyro.cli(main)
