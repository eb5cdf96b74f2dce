"""The tasks, one a module. Those imported here are registered for runs and commands; by
`register_task` a file of yours adds its own."""

from fastdml.train.tasks import classification, own_images, reid
from fastdml.train.tasks.task import Evaluation, Prepared, Task, register_task

__all__ = [
    "Evaluation",
    "Prepared",
    "Task",
    "classification",
    "own_images",
    "register_task",
    "reid",
]
