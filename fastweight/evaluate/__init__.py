"""Scoring a model: bits per byte, byte-exact, and the loss by position in the document."""

from fastweight.evaluate.positions import PositionBucket
from fastweight.evaluate.reading import Document, DocumentList, DocumentSet, encode_documents
from fastweight.evaluate.scoring import Scored, loss_by_position, score

__all__ = [
    "Document",
    "DocumentList",
    "DocumentSet",
    "PositionBucket",
    "Scored",
    "encode_documents",
    "loss_by_position",
    "score",
]
