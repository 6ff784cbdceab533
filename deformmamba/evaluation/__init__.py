"""Scores: models compared over volumes, and the assessment that a model card is made from."""

from deformmamba.evaluation.compare import evaluate

__all__ = ["evaluate"]
