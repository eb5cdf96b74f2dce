"""`MutualStats`: statistics of the peers on one batch, kept as the one vector the kernel wrote."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator, Sequence
from typing import Any, overload

from fastdml_kernels.stats_layout import StatsLayout, stats_layout
from torch import Tensor

from fastdml.torch_private import register_tree_node


class MutualStats(Sequence[Tensor]):
    """Statistics of the peers on one batch: device tensors without gradient; reading a value waits.

    `packed` is the vector that the loss's kernel wrote; each field is a view of it, made when
    somebody reads the field. Unpacks, iterates and indexes as a named tuple of the fields. With
    `sample_weight` a row of weight w is w rows, in means and in numbers of rows.
    """

    _fields = ("ce", "kl", "pairwise_kl", "entropy", "correct", "ensemble_correct")
    packed: Tensor  # (layout.size,)
    K: int

    def __new__(
        cls,
        ce: Tensor,
        kl: Tensor,
        pairwise_kl: Tensor,
        entropy: Tensor,
        correct: Tensor,
        ensemble_correct: Tensor,
    ) -> MutualStats:
        """Of the fields; the numbers of labelled rows, which are none, are then unknown."""
        unknown = ce.new_full((), float("nan"))
        packed = stats_layout(len(ce)).pack(
            {
                "ce": ce, "kl": kl, "label_weight": unknown, "labelled": unknown,
                "entropy": entropy, "correct": correct, "ensemble_correct": ensemble_correct,
                "pairwise_kl": pairwise_kl,
            }
        )  # fmt: skip
        return cls.from_packed(packed, len(ce))

    @classmethod
    def from_packed(cls, packed: Tensor, K: int) -> MutualStats:
        """Of K peers' statistics as the kernels pack them, without a copy."""
        self = object.__new__(cls)
        self.packed, self.K = packed, K
        return self

    def of_first(self, K: int) -> MutualStats:
        """Of the first K peers alone; `ensemble_correct` stays that of all."""
        views = self.layout.views(self.packed)
        own = {n: v[:K] if v.dim() == 1 else v[:K, :K] if v.dim() else v for n, v in views.items()}
        return self.from_packed(stats_layout(K).pack(own), K)

    @property
    def layout(self) -> StatsLayout:
        """Where each statistic is in `packed`."""
        return stats_layout(self.K)

    @property
    def ce(self) -> Tensor:
        """(K,) cross-entropy, mean over the labelled rows."""
        return self.layout.view(self.packed, "ce")

    @property
    def kl(self) -> Tensor:
        """(K,) the KL term before kl_weight, mean over the rows that take part."""
        return self.layout.view(self.packed, "kl")

    @property
    def pairwise_kl(self) -> Tensor:
        """(K, K) T**2 KL(p_l || p_k) of [teacher l, student k], mean over rows."""
        return self.layout.view(self.packed, "pairwise_kl")

    @property
    def entropy(self) -> Tensor:
        """(K,) of softmax(z), in nats, mean over rows."""
        return self.layout.view(self.packed, "entropy")

    @property
    def correct(self) -> Tensor:
        """(K,) rows whose largest logit is the label's; ties go to the first class."""
        return self.layout.view(self.packed, "correct")

    @property
    def ensemble_correct(self) -> Tensor:
        """() the same of the mean of the K probabilities."""
        return self.layout.view(self.packed, "ensemble_correct")

    def _asdict(self) -> dict[str, Tensor]:
        views = self.layout.views(self.packed)
        return {name: views[name] for name in self._fields}

    def _replace(self, **changes: Tensor) -> MutualStats:
        return type(self)(**(self._asdict() | changes))

    def __len__(self) -> int:
        return len(self._fields)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._asdict().values())

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Tensor, ...]: ...
    def __getitem__(self, index: int | slice) -> Tensor | tuple[Tensor, ...]:
        return tuple(self)[index]

    def __repr__(self) -> str:
        fields = (f"{name}={value!r}" for name, value in self._asdict().items())
        return f"{type(self).__name__}({', '.join(fields)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_packed, (self.packed, self.K)


# What tree_map makes of the fields where they become no tensors, such as lists.
_Fields: Any = namedtuple("_Fields", MutualStats._fields)  # type: ignore[misc]


def _of_fields(fields: list[Any]) -> Any:
    kind = MutualStats if all(isinstance(value, Tensor) for value in fields) else _Fields
    return kind(*fields)


register_tree_node(MutualStats, list, _of_fields, "fastdml.MutualStats")  # as a named tuple is one
