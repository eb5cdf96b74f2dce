"""Makes the pictures of the documentation from real runs, with fixed seeds.

python -m docs.pictures                   pairwise_kl.png and report.png: two minutes
python -m docs.pictures --cifar100 data   curves.png too, from CIFAR-100 in that folder: 20 minutes

Needs Chromium for the report's picture. images/step.svg is drawn by hand.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGES = Path(__file__).resolve().parent / "images"
DIGITS = (
    "digits --peers resnet8 resnet8 resnet14 --validation 0.1 --independent --seed 0 "
    "--execution eager --amp off"
)
CURVES = (  # as docs/results.md shows it, with its table
    "cifar100 --peers resnet20 resnet20 --subset 10000 --epochs 8 --schedule cosine --independent"
)
WINDOW = {"width": 1100, "height": 900, "deviceScaleFactor": 1, "mobile": False}


def fastdml(*words: str | Path) -> None:
    """The command, on one thread."""
    command = [sys.executable, "-m", "fastdml", *map(str, words)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


def photograph(page: Path, picture: Path) -> None:
    """What Chromium shows of a page before anybody scrolls."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    with tempfile.TemporaryDirectory() as profile:
        for flag in (
            "headless=new", "no-sandbox", "disable-gpu", "no-first-run", "hide-scrollbars",
            "disable-background-networking", "disable-component-update", "disable-sync",
            f"user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(f"--{flag}")
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        try:
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", WINDOW)
            driver.get(page.resolve().as_uri())
            driver.save_screenshot(str(picture))
        finally:
            driver.quit()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cifar100", metavar="DIR", help="draw curves.png from the data there")
    cifar100 = parser.parse_args(arguments).cifar100
    with tempfile.TemporaryDirectory() as work:
        run, page = Path(work) / "digits", Path(work) / "report.html"
        fastdml("train", *DIGITS.split(), "--folder", run)
        shutil.copy(run / "pairwise_kl.png", IMAGES)
        fastdml("report", run, "--to", page)
        photograph(page, IMAGES / "report.png")
        if cifar100:
            run = Path(work) / "curves"
            fastdml("train", *CURVES.split(), "--root", cifar100, "--folder", run)
            shutil.copy(run / "curves.png", IMAGES)


if __name__ == "__main__":
    main()
