"""A cohort over several devices or machines: a mesh ("peer", "data") of torchrun's ranks.

Along "peer" each row trains its own peers, along "data" each column sees its share of a batch.
"""

from __future__ import annotations

from fastdml.parallel.batch_norm import (
    averaged_statistics,
    separate_batchnorm,
    sync_batchnorm,
)
from fastdml.parallel.evaluation import answering, exchanged, forward
from fastdml.parallel.global_means import total
from fastdml.parallel.mesh import Mesh, make_mesh
from fastdml.parallel.placement import auto_sizes
from fastdml.parallel.processes import RankLost
from fastdml.parallel.remote_peer import RemotePeer
from fastdml.parallel.shards import shard, whole_weights

__all__ = [
    "Mesh",
    "RankLost",
    "RemotePeer",
    "answering",
    "auto_sizes",
    "averaged_statistics",
    "exchanged",
    "forward",
    "make_mesh",
    "separate_batchnorm",
    "shard",
    "sync_batchnorm",
    "total",
    "whole_weights",
]
