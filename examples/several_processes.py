"""The training step in several processes, one a GPU (or on CPUs): each peer is a
DistributedDataParallel, which averages its gradients over the processes.

torchrun --nproc-per-node 2 examples/several_processes.py
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fastdml import Cohort, MutualLoss
from fastdml.engine import make_optimizer, make_step


def main(epochs: int = 3, folder: str | None = None) -> list[float]:
    """Accuracy of each peer on the last 360 images. Process 0 saves the peers in `folder`."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8)
    labels = torch.tensor(digits.target)
    train = TensorDataset(images[:1437], labels[:1437])
    sampler = DistributedSampler(train, shuffle=True, drop_last=True)  # a share for each process
    loader = DataLoader(train, batch_size=32, sampler=sampler, drop_last=True)

    cohort = Cohort(["resnet8", "resnet8"], num_classes=10, in_channels=1, seed=0).to(device)
    replicas = Cohort([DistributedDataParallel(peer) for peer in cohort], num_classes=10)
    optimizer = make_optimizer(replicas, "sgd", lr=0.1, momentum=0.9)
    step = make_step(replicas, MutualLoss(), optimizer, execution="eager")
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            step(*(tensor.to(device) for tensor in batch))

    cohort.eval()  # the same modules as in the replicas
    with torch.inference_mode():
        logits = cohort(images[1437:].to(device))
    accuracies = [(z.argmax(1).cpu() == labels[1437:]).float().mean().item() for z in logits]
    if dist.get_rank() == 0:
        print("accuracies:", accuracies)
        if folder:
            cohort.save(folder)
    dist.destroy_process_group()
    return accuracies


if __name__ == "__main__":
    main(folder=sys.argv[1] if sys.argv[1:] else None)
