"""What peers learn: a task a module. Those imported here are there for runs and commands."""

from fastdml.train.tasks import classification, reid

__all__ = ["classification", "reid"]
