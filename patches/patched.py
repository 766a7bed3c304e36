"""The former name of `patches.subject`, which MLflow models that were pushed before it import."""

from patches.subject import PatchedModel

__all__ = ["PatchedModel"]
