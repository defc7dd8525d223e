"""Compile kernels for a GPU on a machine without one: what they need of it, and whether the compiler takes them.

`compile_for(arch, jobs)` runs in a child process, because this one may interpret. A job is a dict:
kernel: "package.module:name"; signature: argument → type as "*bf16", "i32", "constexpr"; constants: argument → value;
num_warps, num_stages, maxnreg. Back comes, per job: shared (bytes), registers and spills (bytes of local memory
per thread), and whether wgmma is used.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHARED_LIMIT = 227 * 1024  # bytes per block on sm_90


def compile_for(arch: int, jobs: list[dict]) -> list[dict]:
    """What each job's kernel needs on compute capability `arch` (80, 90)."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, __file__, str(arch)],
        input=json.dumps(jobs),
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _compile(arch: int, job: dict) -> dict:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget

    module, name = job["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), name)
    kernel = kernel.fn if isinstance(kernel, triton.runtime.autotuner.Autotuner) else kernel
    # torch aligns what it allocates, and Triton specialises kernels for that.
    pointers = [i for i, kind in enumerate(job["signature"].values()) if kind.startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = triton.compiler.ASTSource(kernel, job["signature"], constexprs=job["constants"], attrs=aligned)
    options = {key: job[key] for key in ("num_warps", "num_stages", "maxnreg") if key in job}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {
        "kernel": name,
        "shared": binary.metadata.shared,
        "wgmma": "wgmma" in binary.asm["ptx"],
        **_resources(binary),
    }


def _resources(binary) -> dict:
    """Registers and local memory, from the machine code's own records."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    fields = dict(
        part.split(":", 1) for part in text.replace("\n", " ").split() if part.count(":") == 1 and part[-1] != ":"
    )
    return {"registers": int(fields["REG"]), "spills": int(fields.get("LOCAL", 0)) + int(fields["STACK"])}


if __name__ == "__main__":
    print(json.dumps([_compile(int(sys.argv[1]), job) for job in json.load(sys.stdin)]))
