"""Text: a network of averaged embeddings and a convolutional one learn from each other.

python examples/text_classification.py

Which documentation a sentence is from: Python's standard library, numpy or torch. The sentences are
the docstrings of what is installed here. To `fit` a text is a row of token ids, (N, L) int64; a
peer is any module that makes logits of them, so that one of Hugging Face's needs only a `forward`
that calls it with input_ids and attention_mask=ids.ne(0) and returns `.logits`.
"""

from __future__ import annotations

import argparse
import collections
import decimal
import email
import inspect
import itertools
import json
import logging
import os
import pathlib
import random
import re
import socket
import statistics
import tempfile
from collections import Counter
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

import fastdml

LIBRARIES: dict[str, list[ModuleType]] = {
    "python": [argparse, collections, decimal, email, inspect, itertools, json, logging, os,
               pathlib, random, re, socket, statistics, tempfile],
    "numpy": [np, np.linalg, np.fft, np.random],
    "torch": [torch, torch.nn, torch.nn.functional, torch.linalg],
}  # fmt: skip
PADDING, UNKNOWN, WORDS, LENGTH = 0, 1, 3000, 24


def sentences(modules: list[ModuleType]) -> list[list[str]]:
    """The words of each sentence of the public docstrings; the libraries' own names left out."""
    found: dict[str, None] = {}
    for thing in (getattr(m, name) for m in modules for name in dir(m) if name[0] != "_"):
        text = inspect.getdoc(thing) if callable(thing) else None
        found |= dict.fromkeys(re.split(r"(?<=\.)\s+|\n\n", text or ""))
    split = (re.findall(r"[a-z]+", sentence.lower()) for sentence in found)
    split = ([w for w in words if w not in ("python", "numpy", "np", "torch")] for words in split)
    return [words for words in split if len(words) >= 5]


def corpus(seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids (N, LENGTH) and labels (N,), for training, validation and test."""
    texts = [(words, k) for k, m in enumerate(LIBRARIES.values()) for words in sentences(m)]
    random.Random(seed).shuffle(texts)
    texts = texts[:6000]
    first, second = int(0.8 * len(texts)), int(0.9 * len(texts))
    counts = Counter(word for words, _ in texts[:first] for word in words)
    number = {word: k for k, (word, _) in enumerate(counts.most_common(WORDS), UNKNOWN + 1)}
    ids = np.full((len(texts), LENGTH), PADDING)
    for row, (words, _) in zip(ids, texts, strict=True):
        words = words[:LENGTH]
        row[: len(words)] = [number.get(word, UNKNOWN) for word in words]
    labels = np.array([label for _, label in texts])
    parts = (slice(first), slice(first, second), slice(second, None))
    return [(ids[part], labels[part]) for part in parts]


class Average(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS + 2, width, padding_idx=PADDING)
        self.head = nn.Linear(width, len(LIBRARIES))

    def forward(self, ids: Tensor) -> Tensor:  # (N, L) -> (N, C)
        count = ids.ne(PADDING).sum(1, keepdim=True).clamp(min=1)
        return self.head(self.table(ids).sum(1) / count)


class Convolution(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS + 2, width, padding_idx=PADDING)
        self.conv = nn.Conv1d(width, 64, 3, padding=1)
        self.head = nn.Linear(64, len(LIBRARIES))

    def forward(self, ids: Tensor) -> Tensor:
        features = self.conv(self.table(ids).transpose(1, 2)).relu()  # (N, 64, L)
        return self.head(features.amax(2))


def main(folder: str | None = None, epochs: int = 6) -> fastdml.train.TrainResult:
    """The result: `print` shows the accuracy on the sentences for testing."""
    train, validation, test = corpus()
    torch.manual_seed(0)
    cohort = fastdml.Cohort([Average(), Convolution()], num_classes=len(LIBRARIES))
    config = fastdml.train.TrainConfig(
        epochs=epochs, batch_size=64, optimizer="adam", lr=3e-3, schedule="cosine", folder=folder
    )
    return fastdml.train.fit(cohort, train, test, config, validation=validation)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(main(f"{folder}/run"))
