"""Corpora, tokenizers, the token store, the sampler and batches: text in, `Batch` out."""

from fastweight.data.batches import IGNORED, Batch, check_batch, loader, read_once, targets_ahead, weights_ahead
from fastweight.data.megatron import import_megatron
from fastweight.data.mixture import Mixture
from fastweight.data.overlap import DocumentOverlap, Overlap, overlap
from fastweight.data.packing import Bins, Documents, LongDocuments
from fastweight.data.parts import merge
from fastweight.data.prepare import PrepareProgress, prepare
from fastweight.data.sampler import Sampler, permute
from fastweight.data.shard_export import export_shards
from fastweight.data.shard_import import import_shards
from fastweight.data.shards import find_shards, read_shard, write_shard
from fastweight.data.sources import Source, SourceFile, open_source
from fastweight.data.store import Split, Store, StoreError
from fastweight.data.store_writer import StoreWriter
from fastweight.data.streams import Streams
from fastweight.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    FileTokenizer,
    SentencePieceTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
)
from fastweight.data.views import Windows
from fastweight.data.weights import remove_weights, write_weights

__all__ = [
    "IGNORED",
    "BPETokenizer",
    "Batch",
    "Bins",
    "ByteTokenizer",
    "DocumentOverlap",
    "Documents",
    "FileTokenizer",
    "LongDocuments",
    "Mixture",
    "Overlap",
    "PrepareProgress",
    "Sampler",
    "SentencePieceTokenizer",
    "Source",
    "SourceFile",
    "Split",
    "Store",
    "StoreError",
    "StoreWriter",
    "StreamDecoder",
    "Streams",
    "Tokenizer",
    "Windows",
    "check_batch",
    "export_shards",
    "find_shards",
    "import_megatron",
    "import_shards",
    "load_tokenizer",
    "loader",
    "merge",
    "open_source",
    "overlap",
    "permute",
    "prepare",
    "read_once",
    "read_shard",
    "remove_weights",
    "targets_ahead",
    "weights_ahead",
    "write_shard",
    "write_weights",
]
