"""Rows of numbers: three networks of different widths learn from arrays, and from each other.

    python examples/tabular.py        (needs: pip install scikit-learn)

Whether a tumour is benign, from 30 measurements of its cells (569 rows that scikit-learn has).
Arrays go to `fit` as they are; the rows for validation choose the best weights.
"""

from __future__ import annotations

import tempfile

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn

import fastdml


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(30, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2)
    )


def main(folder: str | None = None, epochs: int = 20) -> fastdml.train.TrainResult:
    """The result: `print` shows the accuracy on the rows for testing."""
    data = load_breast_cancer()
    x, x_test, y, y_test = train_test_split(data.data, data.target, test_size=0.25, random_state=0)
    x, x_val, y, y_val = train_test_split(x, y, test_size=0.2, random_state=0)
    scaler = StandardScaler().fit(x)
    train, validation, test = (
        (scaler.transform(rows), labels)
        for rows, labels in ((x, y), (x_val, y_val), (x_test, y_test))
    )
    torch.manual_seed(0)
    cohort = fastdml.Cohort([network(16), network(32), network(64)], num_classes=2)
    config = fastdml.train.TrainConfig(
        epochs=epochs, patience=8, batch_size=32, lr=0.05, schedule="cosine", folder=folder
    )
    return fastdml.train.fit(cohort, train, test, config, validation=validation)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(main(f"{folder}/run"))
