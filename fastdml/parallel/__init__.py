"""A cohort over several devices or machines: a mesh ("peer", "data") of torchrun's ranks.

Along "peer" each row trains its own peers, along "data" each column sees its share of a batch.
"""

from __future__ import annotations

from fastdml.parallel.failure import RankLost
from fastdml.parallel.mesh import Mesh, make_mesh
from fastdml.parallel.placement import auto_sizes
from fastdml.parallel.remote_peer import RemotePeer
from fastdml.parallel.shards import shard, whole_weights

__all__ = [
    "Mesh",
    "RankLost",
    "RemotePeer",
    "auto_sizes",
    "make_mesh",
    "shard",
    "whole_weights",
]
