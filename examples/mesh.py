"""The training step on a mesh of processes, one a GPU (or on CPUs): rows train peers of their own
and exchange logits, columns share each batch.

torchrun --nproc-per-node 4 examples/mesh.py 2 2 FOLDER       2 rows, 2 columns
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits

from fastdml import Cohort, MutualLoss, parallel
from fastdml.engine import make_optimizer, make_step


def main(
    rows: int = 1, columns: int = 1, folder: str | None = None, epochs: int = 3
) -> list[float]:
    """Accuracy of each peer on the last 360 images. Rank 0 saves all peers in `folder`."""
    mesh = parallel.make_mesh(peer=rows, data=columns)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8)
    labels = torch.tensor(digits.target)

    cohort = Cohort(["resnet8", "resnet8"], num_classes=10, in_channels=1, seed=0)
    taken = mesh.distribute(cohort)  # peers of other rows leave their places here
    cohort.to(mesh.device)
    optimizer = make_optimizer(cohort, "sgd", lr=0.1, momentum=0.9)
    step = make_step(cohort, MutualLoss(), optimizer, mesh=mesh)
    for epoch in range(epochs):
        order = torch.randperm(1437, generator=torch.Generator().manual_seed(epoch))
        for batch in order[:1408].split(64):  # of all processes
            own = batch.chunk(mesh.data)[mesh.column]  # this column's share
            output = step(images[own].to(mesh.device), labels[own].to(mesh.device))

    losses = parallel.total(output, mesh).losses  # of the whole batch and all peers
    with parallel.averaged_statistics(cohort, mesh), torch.inference_mode():  # BatchNorm's
        mesh.collect(cohort, taken)  # all peers with their trained weights, on every process
        logits = cohort.to(mesh.device).eval()(images[1437:].to(mesh.device))
        accuracies = [(z.argmax(1).cpu() == labels[1437:]).float().mean().item() for z in logits]
        if mesh.lead:
            print("losses:", losses.tolist(), "accuracies:", accuracies)
            if folder:
                cohort.save(folder)
    dist.barrier()
    dist.destroy_process_group()
    return accuracies


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:4])
