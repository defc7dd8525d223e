"""Score first, then learn: weights are values, and a learner is fed only what was scored."""

from fastweight.learn.in_place import InPlaceSgd
from fastweight.learn.learner import DocumentLearner, GlobalLearner, Learner
from fastweight.learn.lora import DocumentLora
from fastweight.learn.pieces import Piece, Text
from fastweight.learn.scored import Scored, score_pieces
from fastweight.learn.sgd import GlobalSgd
from fastweight.learn.weights import RowWeights, SharedWeights, Weights

__all__ = [
    "DocumentLearner",
    "DocumentLora",
    "GlobalLearner",
    "GlobalSgd",
    "InPlaceSgd",
    "Learner",
    "Piece",
    "RowWeights",
    "Scored",
    "SharedWeights",
    "Text",
    "Weights",
    "score_pieces",
]
