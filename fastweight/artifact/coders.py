"""Brotli and Zstandard on untrusted bytes: the size is known before anything is unpacked."""

from typing import Any

from fastweight.configs import require

BROTLI_QUALITY, BROTLI_WINDOW, ZSTD_LEVEL = 11, 24, 22
CODERS = ("raw", "brotli", "zstd")


def compress(coder: str, data: bytes) -> bytes:
    """`data` by one of CODERS, at its highest setting. Raises ImportError, with advice, if its library is missing."""
    if coder == "brotli":
        return _brotli().compress(data, quality=BROTLI_QUALITY, lgwin=BROTLI_WINDOW)
    if coder == "zstd":
        library = _zstandard()
        # Sizes and checks are the file's own business; the frame need not repeat them.
        options = library.ZstdCompressionParameters.from_level(ZSTD_LEVEL, write_checksum=False, write_dict_id=False)
        return library.ZstdCompressor(compression_params=options).compress(data)
    return data


def decompress(coder: str, data: bytes, size: int) -> bytes:
    """What `compress` was given, which had `size` bytes. Raises ValueError for anything else."""
    if coder == "brotli":
        found = _unbrotli(data, size)
    elif coder == "zstd":
        found = _unzstd(data, size)
    else:
        found = data
    require(len(found) == size, f"a {coder} part holds {len(found)} bytes, {size} were announced")
    return found


def _unbrotli(data: bytes, size: int) -> bytes:
    library = _brotli()
    decoder, found = library.Decompressor(), b""
    try:
        found = decoder.process(data, output_buffer_limit=size)
        # The limit is kept only roughly; what is still inside comes out in small pieces.
        while not decoder.is_finished() and not decoder.can_accept_more_data() and len(found) <= size:
            found += decoder.process(b"", output_buffer_limit=1 << 16)
    except library.error as error:
        raise ValueError(f"a brotli part is damaged ({error})") from error
    require(decoder.is_finished(), "a brotli part is cut short, or longer than announced")
    return found


def _unzstd(data: bytes, size: int) -> bytes:
    library = _zstandard()
    try:
        announced = library.get_frame_parameters(data).content_size
        require(announced == size, f"a zstd part announces {announced} bytes, {size} are needed")
        return library.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except library.ZstdError as error:
        raise ValueError(f"a zstd part is damaged ({error})") from error


def _brotli() -> Any:
    try:
        import brotli
    except ImportError as error:
        raise ImportError("packed models need brotli. Run pip install 'fastweight[golf]'.") from error
    return brotli


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError("packed models need zstandard. Run pip install 'fastweight[golf]'.") from error
    return zstandard
