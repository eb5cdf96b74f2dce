"""Names as people write them: which known name was meant, what to say about it, and names that
differ."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

# Other systems' names of settings, and what they are called here.
OTHER_NAMES = {
    "learning_rate": "lr",
    "base_lr": "lr",
    "initial_lr": "lr",
    "lr_rate": "lr",
    "wd": "weight_decay",
    "l2": "weight_decay",
    "beta1": "momentum",
    "betas": "momentum",
    "opt": "optimizer",
    "optim": "optimizer",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "n_epochs": "epochs",
    "num_train_epochs": "epochs",
    "steps": "iterations",
    "num_steps": "iterations",
    "max_steps": "iterations",
    "max_iter": "iterations",
    "bs": "batch_size",
    "batch": "batch_size",
    "train_batch_size": "batch_size",
    "scheduler": "schedule",
    "lr_scheduler": "schedule",
    "lr_schedule": "schedule",
    "milestones": "lr_drops",
    "lr_milestones": "lr_drops",
    "step_size": "lr_drop_every",
    "lr_step_size": "lr_drop_every",
    "gamma": "lr_drop_factor",
    "lr_gamma": "lr_drop_factor",
    "lr_decay": "lr_drop_factor",
    "warmup": "warmup_epochs",
    "clip": "grad_clip",
    "clip_grad": "grad_clip",
    "max_norm": "grad_clip",
    "max_grad_norm": "grad_clip",
    "gradient_clip_val": "grad_clip",
    "accum": "accumulate",
    "accum_iter": "accumulate",
    "accumulate_grad_batches": "accumulate",
    "gradient_accumulation_steps": "accumulate",
    "model": "peers",
    "models": "peers",
    "arch": "peers",
    "architecture": "peers",
    "net": "peers",
    "networks": "peers",
    "students": "peers",
    "data_dir": "root",
    "data_path": "root",
    "data_root": "root",
    "dataset_dir": "root",
    "output": "folder",
    "output_dir": "folder",
    "out_dir": "folder",
    "save_dir": "folder",
    "log_dir": "folder",
    "logdir": "folder",
    "work_dir": "folder",
    "run_dir": "folder",
    "gpu": "device",
    "gpus": "device",
    "cuda": "device",
    "precision": "amp",
    "mixed_precision": "amp",
    "fp16": "amp",
    "bf16": "amp",
    "half": "amp",
    "t": "temperature",
    "tau": "temperature",
    "temp": "temperature",
    "alpha": "kl_weight",
    "kd_weight": "kl_weight",
    "distill_weight": "kl_weight",
    "mutual_weight": "kl_weight",
    "smoothing": "label_smoothing",
    "ema_decay": "ema",
    "model_ema_decay": "ema",
    "hflip": "flip",
    "augmentation": "augment",
    "auto_augment": "augment",
    "aa": "augment",
    "use_pretrained": "pretrained",
    "log_wandb": "wandb",
    "use_wandb": "wandb",
    "random_flip": "flip",
    "padding": "pad",
    "manual_seed": "seed",
    "random_seed": "seed",
    "log_interval": "log_every",
    "print_freq": "log_every",
    "logging_steps": "log_every",
    "eval_interval": "eval_every",
    "eval_freq": "eval_every",
    "val_every": "eval_every",
    "save_interval": "save_every_steps",
    "save_freq": "save_every_steps",
    "checkpoint_every": "save_every_steps",
    "resume_from": "resume",
    "resume_from_checkpoint": "resume",
    "num_threads": "threads",
    "torch_compile": "compile",
    "random_erasing": "erasing",
    "num_instances": "images_per_id",
    "instances": "images_per_id",
    "bnneck": "neck",
    "img_height": "height",
    "img_width": "width",
    "max_samples": "subset",
}


def unique(names: Sequence[str]) -> list[str]:
    """Repeated names get -1, -2, ...; the others stay."""
    total, found = Counter(names), []
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        found.append(f"{name}-{seen[name]}" if total[name] > 1 else name)
    return found


def nearest(
    name: str, known: Iterable[str], count: int = 3, *, similarity: float = 0.7
) -> list[str]:
    """At most `count` of the `known` names that are written much like `name`, most alike first.
    Capitals make no difference, nor - in place of _. similarity: 0 (anything) to 1 (the same)."""
    by_plain: dict[str, str] = {}
    for other in known:
        by_plain.setdefault(_plain(other), other)
    close = difflib.get_close_matches(_plain(name), by_plain, count, similarity)
    return [by_plain[plain] for plain in close]


def fits(name: str, pattern: str) -> bool:
    """Whether `name`, in small letters, has `pattern` in it, or fits it where it has a * or ?."""
    pattern = pattern.lower()
    return fnmatchcase(name, pattern) if set("*?") & set(pattern) else pattern in name


def advice(name: str, known: Iterable[str], *, others: str = "there is {}") -> str:
    """What to say of a name that is not `known`: "did you mean lr?" where it is another system's
    name for a known setting, or a slip of the hand; else `others`, with all that are known.

    Options are compared without their dashes: --no-flop is near --no-flip, not near --flip.
    """
    known = list(known)
    option = name.startswith("--")
    flag = "--no-" if name.startswith("--no-") else "--" if option else ""

    def spelt(setting: str) -> str:
        return flag + setting.replace("_", "-") if option else setting

    found = {other: spelt(own) for other, own in OTHER_NAMES.items() if spelt(own) in known}
    found |= {_plain(n.removeprefix(flag)): n for n in known if n.startswith(flag)}
    near = nearest(name.lower().replace("_", "-").removeprefix(flag), found, 1)
    return f"did you mean {found[near[0]]}?" if near else others.format(", ".join(known))


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
