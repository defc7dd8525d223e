"""A pretrained model learns to remember, start to end: load, add a memory, train it in stages, compare. Resumable."""

from fastweight.conversion.config import ConversionConfig, InPlaceRecipe, MagConfig, Recipe
from fastweight.conversion.record import load_conversion
from fastweight.conversion.result import make_report, request_bytes
from fastweight.conversion.run import convert

__all__ = [
    "ConversionConfig",
    "InPlaceRecipe",
    "MagConfig",
    "Recipe",
    "convert",
    "load_conversion",
    "make_report",
    "request_bytes",
]
