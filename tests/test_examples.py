"""The examples run and learn."""

from __future__ import annotations

import copy
import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str, *needs: str) -> ModuleType:
    for package in needs:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_loop():
    accuracies = example("plain_loop", "sklearn").main()
    assert len(accuracies) == 2
    assert min(accuracies) > 0.8  # chance is 0.1


def test_optimizer_per_peer():
    accuracies = example("optimizer_per_peer", "sklearn").main()
    assert len(accuracies) == 2
    assert min(accuracies) > 0.8  # chance is 0.1


def test_compiled_step():
    first, last = example("compiled_step").main()
    assert last < 0.9 * first


def test_lightning_module():
    metrics = example("lightning_module", "sklearn", "lightning").main()
    assert min(metrics["val/top1_0"], metrics["val/top1_1"]) > 0.8
    assert metrics["train/kl_0"] > 0


def test_lightning_optimizer_per_peer():
    metrics = example("lightning_optimizer_per_peer", "sklearn", "lightning").main(epochs=3)
    assert min(metrics["val/top1_0"], metrics["val/top1_1"]) > 0.75  # chance is 0.1
    assert metrics["train/kl_1"] > 0


def test_timm_task():
    scores = example("timm_task", "sklearn", "timm").main(epochs=2)
    assert min(scores.values()) > 70  # chance is 10


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_our_task_of_timm_has_the_numbers_of_its_own(T):
    module = example("timm_task", "sklearn", "timm")
    timm, task = pytest.importorskip("timm"), pytest.importorskip("timm.task")
    torch.manual_seed(0)
    models = [timm.create_model("test_resnet", num_classes=10) for _ in range(2)]
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    results = []
    for kind in (module.FusedDistillationTask, task.LogitDistillationTask):
        student, teacher = map(copy.deepcopy, models)
        made = kind(student, teacher, task_loss_weight=0.3, temperature=T).train()
        result = made(images, labels)
        result["loss"].backward()
        assert all(w.grad is None for w in teacher.parameters())
        results.append([result["loss"], result["output"], *(w.grad for w in student.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_hf_trainer():
    accuracies = example("hf_trainer", "transformers", "accelerate").main()
    assert min(accuracies) > 0.75  # chance is 0.5


def test_hf_distillation():
    before, after = example("hf_distillation", "transformers", "accelerate").main()
    assert after < 0.6 * before


def test_hf_distillation_steps_as_the_plain_formula_in_float64(tmp_path):
    """One step of two batches of different lengths: the mean over their tokens together."""
    module = example("hf_distillation", "transformers", "accelerate")
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    student, teacher = module.llama(16, 1, 0.3).double(), module.llama(24, 2, 0.5).double()
    model = module.Distillation(student, teacher)
    texts = module.texts(6)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=3, gradient_accumulation_steps=2,
        learning_rate=1.0, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant",
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False,
    )  # fmt: skip
    kept = {name: p.detach().clone() for name, p in student.named_parameters()}

    total, count = torch.zeros((), dtype=torch.float64), 0
    for text in texts:  # each alone: no padding, no chunks, full logits
        ids = text["input_ids"][None]
        z = student(ids).logits[0, :-1]
        with torch.no_grad():
            t = teacher(ids).logits[0, :-1]
        log_q, log_t = (torch.log_softmax(x / 2, 1) for x in (z, t))
        log_m = torch.logaddexp(log_q, log_t) - math.log(2)
        js = ((log_t - log_m) * log_t.exp() + (log_q - log_m) * log_q.exp()).sum() / 2
        total = total + F.cross_entropy(z, ids[0, 1:], reduction="sum") + 4 * js
        count += len(z)
    expected = total / count
    names, parameters = zip(*student.named_parameters(), strict=True)
    grads = torch.autograd.grad(expected, parameters)

    result = Trainer(model, arguments, data_collator=module.collate, train_dataset=texts).train()
    assert result.training_loss == pytest.approx(expected.item(), rel=1e-6)  # logged in float32
    for name, p, grad in zip(names, parameters, grads, strict=True):
        torch.testing.assert_close(kept[name] - p.detach(), grad, rtol=1e-9, atol=1e-12)
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())


def test_tabular(tmp_path):
    result = example("tabular", "sklearn").main(str(tmp_path / "run"), epochs=8)
    assert result.chosen_on == "validation"
    assert min(result.headline.top1) > 0.9  # always the same answer is right for 0.63


def test_text_classification(tmp_path):
    module = example("text_classification")
    _, (_, labels), _ = parts = module.corpus()
    most = max((labels == k).mean() for k in range(len(module.LIBRARIES)))
    result = module.main(str(tmp_path / "run"), epochs=4)
    assert result.scores.rows == len(parts[2][1])
    assert min(result.headline.top1) > most + 0.1
