"""The loss as a training task of timm: distillation from a frozen teacher, as timm's own
`LogitDistillationTask` does it, but from one pass over the logits, and with every divergence.

python examples/timm_task.py        (needs: pip install 'timm>=1.0.31')
"""

from __future__ import annotations

from collections.abc import Iterator

import timm
import torch
from sklearn.datasets import load_digits
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import Tensor
from torch.nn import functional as F

from fastdml import mutual_loss


class FusedDistillationTask(LogitDistillationTask):
    """Arguments and numbers are those of timm's task, whose criterion is the cross-entropy.

    options: of `mutual_loss`, such as divergence="reverse", or label_smoothing.
    """

    def __init__(self, *args, options: dict | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.options = options or {}

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        student = self.trainable_module(input)
        with torch.no_grad():  # so that the teacher only teaches
            images = self.teacher.normalize_input(input, self.student_mean, self.student_std)
            teacher = self.teacher(images)
        losses = mutual_loss(
            [student, teacher], target, temperature=self.temperature,
            ce_weight=self.task_loss_weight, kl_weight=self.distill_loss_weight, **self.options,
        )  # fmt: skip
        return {"loss": losses[0], "output": student}


def train(task: TrainingTask, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=3e-3)
    task.train()
    for images, labels in batches:
        optimizer.zero_grad()
        task(images, labels)["loss"].backward()
        optimizer.step()


def main(epochs: int = 3) -> dict[str, float]:
    """Top-1 of teacher and student on the last 360 images, in percent."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
    images = F.interpolate(images, scale_factor=4)  # (1797, 3, 32, 32)
    labels = torch.tensor(digits.target)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(epochs):
            for batch in torch.randperm(1437).split(64):
                yield images[batch], labels[batch]

    teacher, student = (timm.create_model("test_resnet", num_classes=10) for _ in range(2))
    teaching = ClassificationTask(teacher)
    train(teaching, batches())
    learning = FusedDistillationTask(student, teacher, task_loss_weight=0.3, temperature=4.0)
    train(learning, batches())
    scores = {}
    for name, task in (("teacher", teaching), ("student", learning)):
        evaluator, model = task.create_evaluator(), task.get_eval_model().eval()
        with torch.no_grad():
            evaluator.update(model(images[1437:]), labels[1437:])
        scores[name] = evaluator.compute()["top1"]
    return scores


if __name__ == "__main__":
    print("top-1 in percent:", main())
