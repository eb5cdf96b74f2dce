"""Settings of small re-identification runs."""

from __future__ import annotations

# 4 identities x 4 images a step, three steps an epoch, every loss there is
SMALL = {
    "peers": ("resnet8", "resnet8"),
    "height": 16,
    "width": 8,
    "pad": 1,
    "batch_size": 16,
    "images_per_id": 4,
    "iterations": 0,
    "epochs": 2,
    "lr": 3e-3,
    "momentum": 0.9,
    "eval_every": 1,
    "amp": "off",
    "device": "cpu",
    "execution": "eager",
    "threads": 1,
    "tensorboard": False,
    "neck": True,
    "last_stride": 1,
    "erasing": 0.5,
}
