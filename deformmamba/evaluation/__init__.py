"""Scores: comparison of models over volumes, and the assessment behind a model card."""

from deformmamba.evaluation.compare import evaluate

__all__ = ["evaluate"]
