"""Text to train on where nothing can be fetched: the source code of the Python packages that are installed.

Files of UTF-8 with 200 to 100,000 characters are copied to OUT/text, and every n-th of them to OUT/sample, as much as a
tokenizer is trained on. Equal texts are one file.
"""

import hashlib
import shutil
import sysconfig
from pathlib import Path

import tyro

LEAST, MOST = 200, 100_000


def copied(source: Path, text: Path, most: int) -> int:
    """Copy up to about `most` characters; returns how many there are now."""
    text.mkdir(parents=True)
    seen, characters = set(), 0
    for path in sorted(source.rglob("*.py")):
        data = path.read_bytes() if path.is_file() else b""
        try:
            length = len(data.decode())
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(data).digest()
        if not LEAST <= length <= MOST or digest in seen:
            continue
        (text / f"{len(seen):06d}.py").write_bytes(data)
        seen.add(digest)
        characters += length
        if characters >= most:
            break
    return characters


def main(out: Path, source: Path | None = None, most: int = 10**10, sample: int = 2 * 10**7) -> None:
    """Copy source code to train on.

    Args:
        out: Where text and sample are made; neither may be there.
        source: Folder with packages; those of this interpreter if it is not given.
        most: Characters of text, at most.
        sample: Characters of the sample, about.
    """
    source = source or Path(sysconfig.get_path("purelib"))
    characters = copied(source, out / "text", most)
    files = sorted((out / "text").iterdir())
    (out / "sample").mkdir()
    for path in files[:: max(1, characters // sample)]:
        shutil.copy(path, out / "sample")
    print(f"{len(files):,} files, {characters:,} characters from {source}")


if __name__ == "__main__":
    tyro.cli(main)
