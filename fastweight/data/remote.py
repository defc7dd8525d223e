"""A file behind a URL (s3://, gs://, hf://, https:// …), read through fsspec like one on this machine."""

from pathlib import Path
from typing import IO, Any

from fastweight.configs import near_names


def is_url(text: str) -> bool:
    """Whether `text` names a file by protocol."""
    return "://" in text


class RemoteFile:
    """What the readers use of a Path, for a file behind a URL."""

    def __init__(self, url: str) -> None:
        self.url, self.name = url, url.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return self.url

    def open(self, mode: str = "rb") -> IO[bytes]:
        """The file as a stream of bytes, fetched as it is read."""
        files, path = file_system(self.url)
        return files.open(path, mode)


def file_system(url: str) -> tuple[Any, str]:
    """The storage that `url` lies in, and the path there; ImportError or ValueError say what is missing."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"{url}: {error}. Install that package.") from error
    except ValueError as error:
        protocol = url.partition("://")[0]
        known = near_names(protocol, fsspec.available_protocols())
        raise ValueError(f"{url}: no storage of protocol {protocol!r}.{known}") from error


Location = Path | RemoteFile
