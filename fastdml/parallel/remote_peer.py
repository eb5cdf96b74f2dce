"""What stands in a cohort for a peer whose weights are on other ranks."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from fastdml.errors import InputError


class RemotePeer(nn.Module):
    """A module without weights, in the place of a peer that other ranks train.

    peer_name, model: as in `Cohort.names` and `Cohort.models`. num_parameters: of the peer there.
    row: of the mesh, whose ranks hold it. original: the module that was here, where it is kept to
    make copies of, as ranks that exchange weights do; no part of this one. Calling it raises
    InputError.
    """

    def __init__(
        self,
        peer_name: str,
        model: str | None,
        num_parameters: int,
        row: int,
        original: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self._original = (original,)  # which torch does not take for a module of this one
        self.peer_name = peer_name
        self.model = model
        self.num_parameters = num_parameters
        self.row = row

    @property
    def original(self) -> nn.Module | None:
        return self._original[0]

    def forward(self, *inputs: Any, **options: Any) -> NoReturn:
        raise InputError(
            f"peer {self.peer_name} is trained by row {self.row} of the mesh and is not here: "
            "`Mesh.local` lists the peers that are"
        )

    embed = forward

    def extra_repr(self) -> str:
        return f"{self.peer_name}, {self.num_parameters:,} parameters in row {self.row}"
