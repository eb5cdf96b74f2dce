"""Distilling a causal language model inside Hugging Face's Trainer, without its logits.

    python examples/hf_distillation.py        (needs: pip install 'transformers[torch]')

A small Llama learns from a larger frozen one and from the next tokens. `linear_mutual_loss` takes
the last hidden states and the output embeddings of both, so that (tokens, vocabulary) logits never
exist. Both models are made from their configurations, with random weights; for real ones take
`AutoModelForCausalLM.from_pretrained` twice, of one vocabulary.
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from fastdml import linear_mutual_loss

NO_LABEL = -100
VOCABULARY = 97


class Distillation(nn.Module):
    """A student and its frozen teacher as one model, whose output is the student's loss."""

    accepts_loss_kwargs = True  # so that Trainer hands `num_items_in_batch` over

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Distillation:
        super().train(mode)
        self.teacher.eval()  # whatever Trainer says
        return self

    def forward(
        self,
        input_ids: Tensor,  # (B, L)
        attention_mask: Tensor,  # (B, L), 0 at padding
        labels: Tensor,  # (B, L), the next token of each position; NO_LABEL where there is none
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        models = self.student, self.teacher
        hidden = [
            model.base_model(input_ids, attention_mask=attention_mask)[0].flatten(0, 1)
            for model in models
        ]
        heads = [model.get_output_embeddings().weight for model in models]
        # The teacher's head needs no gradient, its hidden states have none: it only teaches.
        losses = linear_mutual_loss(
            hidden, heads, labels.flatten(), divergence="jsd", jsd_beta=0.5, temperature=2.0,
            reduction="sum",
        )  # fmt: skip
        # A step may accumulate several batches of different lengths: the mean is over their tokens
        # together, which Trainer has counted (by `labels`), not a mean of the batches' means.
        count = (labels != NO_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": losses[0] / count}


def collate(texts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pads at the right, and shifts: the label of a token is the one after it. Shifted here, the
    labels that Trainer counts are those that the loss counts."""
    longest = max(len(text["input_ids"]) for text in texts)

    def padded(ids: Tensor, value: int) -> Tensor:
        return pad(ids, (0, longest - len(ids)), value=value)

    ids = [text["input_ids"] for text in texts]
    return {
        "input_ids": torch.stack([padded(i, 0) for i in ids]),
        "attention_mask": torch.stack([padded(torch.ones_like(i), 0) for i in ids]),
        "labels": torch.stack([padded(i[1:], NO_LABEL) for i in ids]),
    }


def llama(hidden_size: int, layers: int, spread: float) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden_size, intermediate_size=2 * hidden_size,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=32, tie_word_embeddings=False, initializer_range=spread,
        bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip


def texts(count: int) -> list[dict[str, Tensor]]:
    """Sequences of 8 to 20 tokens in which each follows from the one before."""
    found = []
    for length in torch.randint(8, 21, (count,)).tolist():
        ids = [int(torch.randint(0, VOCABULARY, ()))]
        while len(ids) < length:
            ids.append((3 * ids[-1] + 1) % VOCABULARY)
        found.append({"input_ids": torch.tensor(ids)})
    return found


def main(steps: int = 40) -> tuple[float, float]:
    """The loss on other texts before and after."""
    torch.manual_seed(0)
    model = Distillation(llama(32, 1, spread=0.05), llama(48, 2, spread=0.2))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=16, gradient_accumulation_steps=2,
            learning_rate=1e-2, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, data_collator=collate, train_dataset=texts(256),
            eval_dataset=texts(32),
        )  # fmt: skip
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    return before, after


if __name__ == "__main__":
    before, after = main()
    print(f"loss on other texts: {before:.3f} before, {after:.3f} after")
