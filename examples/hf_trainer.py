"""The loss inside Hugging Face's Trainer: two BERT classifiers of different depth as one model.

    python examples/hf_trainer.py        (needs: pip install 'transformers[torch]')

Both are made from their configurations, with random weights, and learn a toy task: which of two
marker tokens a sequence holds.
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from fastdml import mutual_loss


class MutualClassifiers(nn.Module):
    """K classifiers over the same tokens; returns the summed loss and stacked logits (N, K, C)."""

    def __init__(self, peers: list[nn.Module]) -> None:
        super().__init__()
        self.peers = nn.ModuleList(peers)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = [peer(input_ids=input_ids).logits for peer in self.peers]
        loss = mutual_loss(logits, labels).sum()
        return {"loss": loss, "logits": torch.stack(logits, dim=1).detach()}


def main(steps: int = 60) -> list[float]:
    """Accuracy of each peer on fresh sequences."""
    torch.manual_seed(0)

    def sequences(count: int) -> list[dict[str, Tensor]]:
        tokens = torch.randint(10, 50, (count, 12))
        labels = torch.randint(0, 2, (count,))
        tokens[torch.arange(count), torch.randint(0, 12, (count,))] = 2 + labels
        return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]

    def classifier(layers: int) -> nn.Module:
        return BertForSequenceClassification(BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=16, num_labels=2,
        ))  # fmt: skip

    peers = [classifier(layers=1), classifier(layers=2)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=64, learning_rate=3e-3,
            report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        model = MutualClassifiers(peers)
        trainer = Trainer(model, arguments, train_dataset=sequences(1024))
        trainer.train()
        result = trainer.predict(sequences(256))
    logits = torch.tensor(result.predictions)  # (256, K, 2)
    labels = torch.tensor(result.label_ids)
    return (logits.argmax(2) == labels[:, None]).float().mean(0).tolist()


if __name__ == "__main__":
    print("accuracy of each peer:", main())
