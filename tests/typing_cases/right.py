"""Uses that a type checker must accept. Checked, never run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import fastdml
import fastdml.engine
import fastdml.train
from fastdml import Cohort, MutualLoss, MutualStats, mutual_loss, mutual_losses
from fastdml.data import HINT, ImageSet, register_dataset
from fastdml.engine import register_execution
from fastdml.engine.eager import EagerStep
from fastdml.models import register_model
from fastdml.train.tasks import Prepared, Task, register_task

logits = [torch.zeros(4, 10), torch.zeros(4, 10)]
labels = torch.zeros(4, dtype=torch.int64)

losses: Tensor = mutual_loss(logits, labels, temperature=2, target="ensemble", gate="correct")
weighted: Tensor = mutual_loss(logits, labels, kl_weight=torch.tensor(0.5), reduction="none")
both: tuple[Tensor, MutualStats] = mutual_loss(logits, labels, return_stats=True)
entropy: Tensor = both[1].entropy
wanted = bool(entropy.sum() > 1)  # known only when it runs
either: Tensor | tuple[Tensor, MutualStats] = mutual_loss(logits, labels, return_stats=wanted)
apart: tuple[Tensor, ...] | tuple[tuple[Tensor, ...], MutualStats] = mutual_losses(
    logits, labels, return_stats=wanted
)
each: tuple[Tensor, ...] = mutual_losses(logits, labels, label_smoothing=0.1)
taught: Tensor = mutual_loss(logits, labels, students=[0], divergence="jsd", jsd_beta=0.1)
masked: Tensor = mutual_loss(logits, labels, students=[True, False], gate="entropy")
by_row: Tensor = mutual_loss(logits, labels, students=torch.tensor([1]), sample_weight=entropy)
of_batch = MutualLoss(gate="confidence")(logits, labels, sample_weight=entropy)
grads: list[Tensor | None] = MutualLoss(students=[0]).value_and_grad(logits, labels)[2]
linear: Tensor = fastdml.linear_mutual_loss(logits, logits, labels, reduction="sum", chunk_rows=4)

cohort = Cohort(["resnet8", nn.Flatten()], 10, seed=1)
peer: nn.Module = cohort[0]
shapes: list[torch.Size] = [z.shape for z in cohort(torch.zeros(2, 3, 8, 8))]
paths: list[Path] = cohort.export("exported", format="torch-export")
optimizer = fastdml.engine.make_optimizer(cohort, "adamw", lr=0.001)
step = fastdml.engine.make_step(
    cohort, MutualLoss(target="ensemble_logits"), optimizer, execution="graph", amp="bf16"
)

result = fastdml.train.cifar100(
    ["resnet32", "resnet32"], Path("data"), epochs=3, lr=1, lr_drops=[1, 2], folder=Path("run")
)
if result is not None:  # as after a dry run
    folder: Path = result.folder
fastdml.train.cifar10(schedule="cosine", dry_run=True)
fastdml.train.digits(("resnet8",), amp="off")
fastdml.train.folder(root="photos", size=32, normalise="imagenet", validation=0.1)
fastdml.train.market1501(recipe="strong", standin=True, margin=None, epochs=1)
own = fastdml.train.folder(["resnet8"], root="images", size=64, validation=0.1, patience=2)

predictor: fastdml.Predictor = fastdml.load(Path("run"), peer="best", weights="best", device="cpu")
probabilities: Tensor = predictor(predictor.preprocess("one.png")[None])
likely: list[list[tuple[str, float]]] = predictor.predict([Path("one.png")], top=3)


class StopsEarly(fastdml.train.Callback):
    def on_epoch(self, event: fastdml.train.EpochEvent) -> str | None:
        return "near enough" if event.losses["ce"][0] < 0.1 else None

    def on_end(self, event: fastdml.train.EndEvent) -> None:
        print(event.stopped, event.best_epoch)


fitted: fastdml.train.TrainResult | None = fastdml.train.fit(
    cohort, [], None, fastdml.train.TrainConfig(epochs=1), validation=[], callbacks=[StopsEarly()]
)
fastdml.train.digits(callbacks=[StopsEarly()])


@register_model("plain", purpose="a test")
def plain(num_classes: int, in_channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels, num_classes))


@register_dataset(
    "noise", task="mine", image_shape=(1, 8, 8), num_classes=2, mean=[1], std=[1], purpose="a test"
)
def noise(root: str | Path) -> tuple[ImageSet, ImageSet]:
    return fastdml.data.load(str(root))


@register_execution("mine", devices=("cpu",))
class Mine(EagerStep):
    pass


class MySettings(fastdml.train.TrainConfig):
    pass


@register_task
class MyTask(Task):
    name = title = "mine"
    settings = MySettings

    @contextmanager
    def prepare(
        self,
        config: MySettings,
        device: torch.device,
        hint: str = HINT,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Prepared]:
        yield Prepared(Cohort(config.peers, 2).to(device), [], None)
