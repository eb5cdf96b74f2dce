"""What `package_smoke.py` checks inside an environment that fastdml was installed into.

python -I package_checks.py bare         with no extra
python -I package_checks.py first-hour   with train, onnx and images
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

COMMAND = Path(sysconfig.get_path("scripts"), "fastdml")
EXTRAS = ("tyro", "yaml", "safetensors", "PIL", "sklearn", "matplotlib", "tensorboard", "tqdm",
          "timm", "torchvision", "onnx", "onnxruntime", "wandb")  # fmt: skip
PACKAGES = ("fastdml", "fastdml.data", "fastdml.engine", "fastdml.metrics", "fastdml.models",
            "fastdml.parallel", "fastdml.train", "fastdml_kernels")  # fmt: skip


def command(*arguments: str, code: int = 0) -> str:
    """What `fastdml ...` prints, which must end with `code`."""
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True)
    said = f"fastdml {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    assert done.returncode == code, said
    return done.stdout if code == 0 else done.stderr


def bare() -> None:
    installed = [name for name in EXTRAS if importlib.util.find_spec(name)]
    assert not installed, f"not an empty environment: {installed}"
    names = public_names()
    loss_is_right()
    one_line_for_each_missing_extra()
    assert command("--version").split() == ["fastdml", metadata.version("fastdml")]
    doctor = command("doctor")
    assert "nothing is broken" in doctor
    assert "pip install 'fastdml[train]'" in doctor
    assert "cifar100" in command("data")
    assert "resnet32" in command("models")
    refusal = command("train", "digits", code=2)
    assert refusal == "fastdml: error: tyro is not installed: pip install 'fastdml[train]'\n", (
        refusal
    )
    import torch

    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {names} public names")
    print("\n".join(line for line in doctor.splitlines() if "loss" in line))


def public_names() -> int:
    """Imports all of them, with no extra there."""
    count = 0
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            getattr(module, name)
            count += 1
        home = Path(module.__file__).parent
        assert (home / "py.typed").is_file() or "." in package, f"{package} exports no types"
    return count


def loss_is_right() -> None:
    from fastdml.machine import self_test

    rows = list(self_test.rows())
    assert all(row.get("right", True) for row in rows), rows
    assert rows[0]["native"] in ("built", "absent")
    assert rows[0]["native"] == "built" or not any(map(shutil.which, ("gcc", "clang"))), rows[0]


def one_line_for_each_missing_extra() -> None:
    import fastdml
    from fastdml.errors import MissingExtra
    from fastdml.report.metrics_log import MetricsLog  # noqa: F401  without TensorBoard

    peers = fastdml.Cohort(["resnet8"], 10)
    calls = {
        "train": lambda: fastdml.train.digits(epochs=1),
        "onnx": lambda: peers.export("exported", format="onnx"),
        "reid": lambda: fastdml.create_model("timm:resnet18", 10),
    }
    for extra, call in calls.items():
        try:
            call()
        except MissingExtra as error:
            text = str(error)
            assert f"pip install 'fastdml[{extra}]'" in text, text
            assert "\n" not in text
        else:
            raise AssertionError(f"{extra}: nothing was missing")


def first_hour() -> None:
    """A folder of images is trained on, reported, exported, predicted and loaded in plain torch, in
    ten commands."""
    own_images(Path("my images"))
    settings = "--size 16 --peers resnet8 resnet8 --epochs 3 --batch-size 8 --validation 0.2"
    image = "my images/red/1.png"
    assert "nothing is broken" in command("doctor")
    command("config", "folder", "--root", "my images", "--to", "mine.yaml")
    command("train", "folder", "--config", "mine.yaml", *settings.split(), "--folder", "run")
    scores = command("evaluate", "run")
    page = command("report", "run").partition(": ")[0]
    assert "<html" in Path(page).read_text()
    top = command("predict", "run", image)
    command("predict", "run", "my images", "--to", "classes.csv")
    assert len(Path("classes.csv").read_text().splitlines()) == 61
    command("export", "run", "--format", "safetensors", "--to", "weights")
    command("export", "run", "--format", "onnx", "--to", "onnx")
    digits = command("train", "digits", "--epochs", "1", "--subset", "320")
    for extra, options in (("wandb", "--wandb"), ("reid", "--peers timm:resnet18"),
                           ("dali", "--loader dali")):  # fmt: skip
        refusal = command("train", "digits", *options.split(), code=2)
        assert refusal.count("\n") == 1, refusal
        assert f"pip install 'fastdml[{extra}]'" in refusal, refusal
    print(scores, top, digits, sep="\n")
    by_fastdml_alone(image)
    by_plain_torch(image)


def by_fastdml_alone(image: str) -> None:
    import torch

    import fastdml

    for path in ("run", "weights/00-resnet8-1.safetensors"):
        predictor = fastdml.load(path)
        probabilities = predictor(predictor.preprocess(image)[None])
        torch.testing.assert_close(probabilities.sum(1), torch.ones(1), rtol=0, atol=1e-5)
        assert predictor.predict([image])[0][0][0] in ("red", "green things", "blau-ü")


def by_plain_torch(image: str) -> None:
    """The code of the model card, where fastdml cannot be imported, gives what fastdml does."""
    import fastdml

    card = Path("weights/00-resnet8-1.md").read_text()
    code = card.split("```python\n")[2].split("```")[0].replace("image.png", f"../{image}")
    hidden = "import sys\nsys.modules['fastdml'] = sys.modules['fastdml_kernels'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{hidden}sys.path.insert(0, '')\n{code}"],
        cwd="weights", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (likely,) = fastdml.load("weights/00-resnet8-1.safetensors").predict([image], top=3)
    shown = [float(number) for number in re.findall(r"\d\.\d+(?:e-\d+)?", done.stdout)]
    for (_, probability), number in zip(likely, shown, strict=True):
        assert abs(probability - number) < 1e-4, (likely, done.stdout)
    print(f"plain torch: {' '.join(done.stdout.split())}")


def own_images(root: Path) -> None:
    """Three classes of one colour each, with noise."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for label, name in enumerate(("red", "green things", "blau-ü")):
        for k in range(20):
            folder = root / name
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 120, (20, 24, 3), dtype=np.uint8)
            pixels[..., label] += 120
            Image.fromarray(pixels).save(folder / f"{k}.png")


if __name__ == "__main__":
    {"bare": bare, "first-hour": first_hour}[sys.argv[1]]()
