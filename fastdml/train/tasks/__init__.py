"""The tasks, one a module. Those imported here are registered for runs and commands."""

from fastdml.train.tasks import classification, reid

__all__ = ["classification", "reid"]
