"""A short run on digits, which the analyses of runs read."""

from __future__ import annotations

import pytest

import fastdml


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    pytest.importorskip("tqdm", reason="training needs the extra train")
    folder = tmp_path_factory.mktemp("runs") / "digits"
    fastdml.train.digits(
        ["resnet8", "resnet8"],
        subset=200,
        epochs=1,
        independent=True,
        deterministic=True,
        device="cpu",
        folder=str(folder),
        tensorboard=False,
        figures=(),
    )
    return folder
