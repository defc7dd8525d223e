"""Scoring a model: bits per byte, byte-exact, and the loss by position in the document."""

from fastweight.evaluate.evaluation import Evaluation, loss_by_position
from fastweight.evaluate.learning import score_and_learn
from fastweight.evaluate.positions import PositionBucket
from fastweight.evaluate.reading import Document, DocumentList, DocumentSet, encode_documents
from fastweight.evaluate.scoring import score
from fastweight.evaluate.selection import keep_highest, token_losses, weigh_by_loss
from fastweight.evaluate.shares import Share, merge_evaluations
from fastweight.learn import Scored

__all__ = [
    "Document",
    "DocumentList",
    "DocumentSet",
    "Evaluation",
    "PositionBucket",
    "Scored",
    "Share",
    "encode_documents",
    "keep_highest",
    "loss_by_position",
    "merge_evaluations",
    "score",
    "score_and_learn",
    "token_losses",
    "weigh_by_loss",
]
