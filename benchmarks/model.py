"""Whole models: training tokens per second, then time and bytes of a decoding step early and late in a text.

python -m benchmarks.model --json FILE. On a GPU: LaCT-760M and a transformer of the same size with full attention, side
by side, at 32,768 tokens in bfloat16, compiled. On a CPU: tiny models.
"""

from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks import decode, train
from benchmarks.timing import machine, print_table, write_json

GPU_PRESETS = ("lact-760m-muon", "lact-760m-momentum", "transformer-760m", "transformer-window-760m")
CPU_PRESETS = ("tiny-lact", "tiny-attention")


COLUMNS = ["preset", "parameters", "ms/step (quartiles)", "tokens/s", "TFLOP/s", "peak GiB"]


def training(presets: tuple[str, ...], options: train.Options) -> list[dict[str, Any]]:
    """One record per preset; one that does not fit the device says so."""
    found = []
    for preset in presets:
        try:
            timing = train.time_steps(preset, "adamw", options)
        except torch.OutOfMemoryError as error:
            print(f"training {preset}: out of memory: {str(error).splitlines()[0]}", flush=True)
            continue
        rate = timing["tokens_per_second"]
        print(f"training {preset}: {rate:,.0f} tokens/s, {timing['median_ms']:.0f} ms", flush=True)
        found.append({"preset": preset, **timing})
    return found


def training_row(r: dict[str, Any]) -> list[str]:
    spread = f"{r['median_ms']:.0f} ({r['low_ms']:.0f}–{r['high_ms']:.0f})"
    memory = f"{r['peak_gib']:.1f}" if "peak_gib" in r else "–"
    return [r["preset"], f"{r['parameters']:,}", spread, f"{r['tokens_per_second']:,.0f}", f"{r['tflops']:.3g}", memory]


def main(
    device: str = "auto",
    presets: tuple[str, ...] = (),
    decoding: tuple[str, ...] | None = None,
    seq_len: int = 0,
    positions: tuple[int, int] = (0, 0),
    compile: bool | None = None,
    activation_checkpointing: bool = False,
    feed_forward_checkpointing: bool = False,
    profile: bool = False,
    seconds: float = 10.0,
    json: Path | None = None,
) -> None:
    """Train and decode with whole models.

    Args:
        device: Where to run; auto takes the GPU if there is one.
        presets: Which models; by default those named above for the device.
        decoding: Which of them also decode; all if it is not given, none if it is given no name.
        seq_len: Tokens of one training step (one sequence); 32,768 on a GPU, 512 on a CPU.
        positions: Tokens read before decoding, early and late; 2,048 and 131,072 on a GPU.
        compile: Compile each block; on a GPU the default.
        activation_checkpointing: Compute whole blocks again in the backward pass.
        feed_forward_checkpointing: Compute the feed-forwards alone again.
        profile: Also say where the time of a training step goes, kernel by kernel; on a GPU.
        seconds: Time per measurement.
        json: Also write the numbers to this file.
    """
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    cuda = where.startswith("cuda")
    presets = presets or (GPU_PRESETS if cuda else CPU_PRESETS)
    options = train.Options(
        seq_len=seq_len or (32768 if cuda else 512), batch_size=1, device=where, seconds=seconds,
        precision="bfloat16" if cuda else "float32", compile=cuda if compile is None else compile,
        activation_checkpointing=activation_checkpointing, feed_forward_checkpointing=feed_forward_checkpointing,
        profile=profile,
    )  # fmt: skip
    trained = training(presets, options)
    about = machine(where)
    title = f"Training, 1 × {options.seq_len} tokens per step, {options.precision}, {about['device']}"
    print_table(title, COLUMNS, [training_row(r) for r in trained])
    write_json(json, {"machine": about, "training": trained})
    at = list(positions) if any(positions) else [2048, 131072] if cuda else [512, 4096]
    decoded = []
    for compiled in (False, True) if options.compile else (False,):
        for preset in presets if decoding is None else decoding:
            with torch.inference_mode():
                decoded.append(decode.measure(preset, at, torch.device(where), compiled))
            print(f"decoding {' / '.join(decode.cells(decoded[-1]))}", flush=True)
            write_json(json, {"machine": about, "training": trained, "decoding": decoded})
    for record in trained if profile else ():  # last: see `profile_steps`
        record["profile"] = train.profile_steps(record["preset"], "adamw", options)
        write_json(json, {"machine": about, "training": trained, "decoding": decoded})
    if decoded:
        print_table("One decoding step and the state", decode.columns(at), [decode.cells(row) for row in decoded])


if __name__ == "__main__":
    tyro.cli(main)
