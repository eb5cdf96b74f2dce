"""Evaluation of retrieval by the peers' features: features, scores, ranked lists, a table.

Evaluation reads every query and gallery image once through all peers, twice with the flip test, and
keeps K features of each on the device, (N, D_k) float32: 160 MB a peer of 2048 for Market-1501.
Images stay decoded between evaluations where they fit.

On a mesh the columns share the images, peers embed them where they are, all ranks get all features,
and the ranks share the scoring of peers and ensemble. Under `torch.distributed` without a mesh each
process embeds its share of the images and all get all. Images are shared in whole batches, so that
features are to the bit those of one process.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdml import metrics, parallel
from fastdml.cohort import Cohort, check_embeds
from fastdml.data import ImageFolderReID, ReidSplit, choose_loader, make_loader
from fastdml.data.loaders.dali import checked
from fastdml.data.reid_validation import HeldOut
from fastdml.engine.amp import Amp, AmpName, resolve_amp
from fastdml.errors import InputError
from fastdml.eval_mode import evaluating
from fastdml.files import safe_name
from fastdml.logs import held
from fastdml.metrics import ReIDScores
from fastdml.names import unique
from fastdml.report.tables import fixed_columns
from fastdml.train.config.reid import ReidConfig
from fastdml.units import percent

if TYPE_CHECKING:
    from fastdml.parallel import Mesh

EVALUATION_BATCH = 128  # images
RANKS = (1, 5, 10, 20)
FPRS = {"1e4": 1e-4, "1e3": 1e-3, "1e2": 1e-2}  # false positive rates, by the scores' names
RERANKING: dict[str, Any] = {"k1": 20, "k2": 6, "lambda_value": 0.3, "metric": "euclidean"}
# of the table of an evaluation
COLUMNS = {
    **{f"rank{k}": f"rank-{k} %" for k in RANKS},
    "mAP": "mAP %",
    "mINP": "mINP %",
    **{f"tpr_{name}": f"TPR@{name[:2]}-{name[2:]} %" for name in FPRS},
}


@dataclass(frozen=True)
class RetrievalScores:
    """Fractions of 1 over the queries that have a match; a value a peer, in order. `tpr_1e4` is the
    true positive rate at a false positive rate of 1e-4, over pairs: see `metrics.reid_scores`.
    What earlier versions did not write is empty or NaN."""

    queries: int
    mAP: list[float]
    mINP: list[float]
    rank1: list[float]
    rank5: list[float]
    rank10: list[float]
    ensemble_mAP: float
    ensemble_mINP: float
    ensemble_rank1: float
    ensemble_rank5: float
    ensemble_rank10: float
    rank20: list[float] = field(default_factory=list)
    tpr_1e4: list[float] = field(default_factory=list)
    tpr_1e3: list[float] = field(default_factory=list)
    tpr_1e2: list[float] = field(default_factory=list)
    ensemble_rank20: float = math.nan
    ensemble_tpr_1e4: float = math.nan
    ensemble_tpr_1e3: float = math.nan
    ensemble_tpr_1e2: float = math.nan

    @classmethod
    def of(cls, peers: Sequence[ReIDScores], ensemble: ReIDScores) -> RetrievalScores:
        """From the scores of each peer and those of the ensemble."""
        values: dict[str, Any] = {"queries": ensemble.queries}
        for name in ("mAP", "mINP"):
            values[name] = [getattr(scores, name) for scores in peers]
            values[f"ensemble_{name}"] = getattr(ensemble, name)
        for k in RANKS:
            values[f"rank{k}"] = [scores.rank(k) for scores in peers]
            values[f"ensemble_rank{k}"] = ensemble.rank(k)
        for name, fpr in FPRS.items():
            values[f"tpr_{name}"] = [scores.tpr[fpr] for scores in peers]
            values[f"ensemble_tpr_{name}"] = ensemble.tpr[fpr]
        return cls(**values)


class Features:
    """The features of a set's images, by any cohort; the images are read and decoded once where
    they fit into memory. rank, world: of the processes that share them, on a mesh its columns; by
    default those of `torch.distributed`."""

    def __init__(
        self,
        source: ReidSplit,
        size: tuple[int, int],
        device: torch.device,
        *,
        loader: str = "auto",
        bad_files: str = "error",
        batch_size: int = EVALUATION_BATCH,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        kind = choose_loader(loader, source, device, train=False, size=size)
        if kind == "dali":
            source = checked(source, bad_files)
        self.source, self.device = source, device
        self.rank, self.world = (rank, world) if rank is not None and world else _processes()
        # of each process, then batches that some repeat, so that all embed as many
        turns = [dealt(len(source), batch_size, r, self.world) for r in range(self.world)]
        self.places = [torch.cat(own) for own, _ in turns]
        own, again = turns[self.rank]
        shown = source if self.world == 1 else source.at(torch.cat([*own, *again]))
        self.loader = make_loader(kind, shown, batch_size, device=device, train=False, size=size)

    def __call__(self, cohort: Cohort, amp: Amp, flip_test: bool = True) -> list[Tensor]:
        """K of (N, D_k) float32, each row of unit length, on the device; the cohort must be in
        evaluation mode. Processes that share the images call it together."""
        mesh = cohort.mesh
        if mesh is not None and (mesh.column, mesh.data) != (self.rank, self.world):
            raise InputError(
                f"features of the share {self.rank} of {self.world}, in column {mesh.column} of "
                f"{mesh.data}: make them with rank=mesh.column, world=mesh.data"
            )
        local = range(len(cohort)) if mesh is None else mesh.local
        found: dict[int, list[Tensor]] = {k: [] for k in local}
        with torch.inference_mode():
            for images, _ in self.loader.epoch(0):
                with amp.autocast():
                    features = [f.float() for f in _embedded(cohort, images, local)]
                    if flip_test:  # the sum has the direction of the mean
                        mirrored = _embedded(cohort, images.flip(3), local)
                        features = [f + m for f, m in zip(features, mirrored, strict=True)]
                for k, f in zip(local, features, strict=True):
                    found[k].append(metrics.normalize_features(f))
            whole = {
                k: self._gathered(torch.cat(parts), None if mesh is None else mesh.data_group)
                for k, parts in found.items()
            }
            return [*(whole.values() if mesh is None else _of_all_peers(whole, mesh))]

    def _gathered(self, own: Tensor, group: Any) -> Tensor:
        if self.world == 1:
            return own
        most = max(map(len, self.places))
        share = own.new_zeros(most, own.shape[1])
        count = len(self.places[self.rank])
        share[:count] = own[:count]
        shares = [torch.empty_like(share) for _ in range(self.world)]
        dist.all_gather(shares, share, group=group)
        found = own.new_empty(len(self.source), own.shape[1])
        for places, rows in zip(self.places, shares, strict=True):
            found[places.to(found.device)] = rows[: len(places)]
        return found


def dealt(n: int, batch_size: int, rank: int, world: int) -> tuple[list[Tensor], list[Tensor]]:
    """The places of each batch of `n` images that is one process's of `world`, which take turns;
    and of one more for a process that would have one fewer than others."""
    batches = [*torch.arange(n).split(batch_size)]
    own = batches[rank::world]
    again = batches[:1] if len(own) < -(-len(batches) // world) else []
    return [torch.arange(0), *own], again


def _embedded(cohort: Cohort, images: Tensor, local: Sequence[int]) -> list[Tensor]:
    """The features of the local peers."""
    peers: list[Any] = [cohort.peers[k] for k in local]
    for k, peer in zip(local, peers, strict=True):
        check_embeds(cohort.names[k], peer)
    return [peer.embed(images) for peer in peers]


def _of_all_peers(own: Mapping[int, Tensor], mesh: Mesh) -> tuple[Tensor, ...]:
    """The features of all peers from those of the local ones."""
    shapes = {int(k): shape for each in mesh.gather(_shapes(own)) for k, shape in each.items()}
    return parallel.exchanged(mesh, own, shapes)


def _shapes(features: Mapping[int, Tensor]) -> dict[str, list[int]]:
    return {str(k): [*f.shape] for k, f in features.items()}


def extract_features(
    cohort: Cohort,
    source: ReidSplit,
    size: tuple[int, int],
    *,
    flip_test: bool = True,
    amp: AmpName = "auto",
    loader: str = "auto",
    batch_size: int = EVALUATION_BATCH,
) -> list[Tensor]:
    """K of (N, D_k) float32, each row of unit length: what the peers of a cohort with a
    re-identification head, on its device, make of a set's images at `size` (height, width).

    With the flip test an image and its mirror image are averaged. Under an initialised
    `torch.distributed` each process extracts a share, and all get all; of a cohort on a mesh each
    column does. Raises InputError where a
    peer has no such head, an image cannot be decoded, or the device lacks the precision.
    """
    device = next(cohort.parameters()).device
    share = {} if cohort.mesh is None else _column(cohort.mesh)
    with evaluating(cohort), held():  # the loader's line on where it keeps images is not shown
        features = Features(source, size, device, loader=loader, batch_size=batch_size, **share)
        return features(cohort, resolve_amp(amp, device), flip_test)


class Retrieval:
    """The evaluation of a run on its query and gallery images. Called, it gives the scores that
    training is judged by: single query, without re-ranking. rank, world: as of `Features`. Of a
    cohort on a mesh all ranks call it together, and get the same."""

    shares_ranks = True  # knows what to do on a mesh

    def __init__(
        self,
        market: ImageFolderReID | HeldOut,
        config: ReidConfig,
        device: torch.device,
        *,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        self.market, self.config = market, config
        self.share: dict[str, Any] = {"rank": rank, "world": world}
        self.amp = resolve_amp(config.amp, device)
        self.query, self.gallery = self._features(market.query), self._features(market.gallery)

    def __call__(self, cohort: Cohort) -> RetrievalScores:
        query, gallery = self._read(self.query, cohort), self._read(self.gallery, cohort)
        return self._scores(query, gallery, cohort.mesh)

    def all_scores(
        self, cohort: Cohort, rerank: bool = True, *, expansion: int = 0, ties: str = "worst"
    ) -> tuple[dict[str, RetrievalScores | None], list[Tensor], list[Tensor]]:
        """Scores by protocol, "single" and "multi", those of multiple queries None without gt_bbox.
        With `rerank` each has another, "single_reranked" and "multi_reranked"; and with `expansion`
        both have those of queries that are expanded by so many images of the gallery,
        "single_expanded", "single_expanded_reranked" and so on. Beside them the K features of
        queries and gallery.

        The ensemble's queries are expanded by what its concatenated features find. ties: as
        `metrics.reid_scores` takes it. Raises InputError where features are not finite.
        """
        query, gallery = self._read(self.query, cohort), self._read(self.gallery, cohort)
        _check_finite(cohort.names, query, gallery)
        expansions = {"": 0, "_expanded": expansion} if expansion else {"": 0}
        rerankings = {"": False, "_reranked": True} if rerank else {"": False}
        scores: dict[str, RetrievalScores | None] = {}
        for kind, asked in (("single", query), ("multi", self._several(query, cohort))):
            for suffix, n in expansions.items():
                for ending, again in rerankings.items():
                    how: dict[str, Any] = {"rerank": again, "expansion": n, "ties": ties}
                    found = self._scores(asked, gallery, cohort.mesh, **how) if asked else None
                    scores[f"{kind}{suffix}{ending}"] = found
        return scores, query, gallery

    def draw(
        self,
        cohort: Cohort,
        query: list[Tensor],
        gallery: list[Tensor],
        count: int,
        folder: Path,
        ties: str = "worst",
    ) -> list[Path]:
        """A picture a peer, NAME.png, and ensemble.png, of what `count` queries find: spread
        evenly over all queries, the same in each picture."""
        asked, among = self.query.source, self.gallery.source
        count = min(count, len(asked))
        places = torch.arange(count) * len(asked) // count
        shown = asked.at(places)
        names, described = list(cohort.names), list(zip(query, gallery, strict=True))
        if len(cohort) > 1:
            names.append("ensemble")
            ensembles = metrics.ensemble_features(query), metrics.ensemble_features(gallery)
            described.append(ensembles)
        # Names may differ only in characters that a file name cannot hold.
        files = unique([safe_name(name, 200) for name in names])
        paths = [folder / f"{name}.png" for name in files]
        for path, (q, g) in zip(paths, described, strict=True):
            metrics.save_ranked_lists(
                path,
                shown.paths,
                among.paths,
                shown.ids,
                among.ids,
                shown.cameras,
                among.cameras,
                metrics.feature_distances(q[places.to(q.device)], g),
                ties=ties,
            )
        return paths

    def _features(self, split: ReidSplit) -> Features:
        config = self.config
        return Features(
            split,
            config.size,
            self.amp.device,
            loader=config.loader,
            bad_files=config.bad_files,
            **self.share,
        )

    def _read(self, features: Features, cohort: Cohort) -> list[Tensor]:
        return features(cohort, self.amp, self.config.flip_test)

    def _several(self, query: list[Tensor], cohort: Cohort) -> list[Tensor] | None:
        """Each query's mean over the images of its identity and camera."""
        if self.market.multi_query is None:
            return None
        with held():  # the loader's line on where it keeps images was shown for the queries
            drawn = self._features(self.market.multi_query)
        source, asked = drawn.source, self.query.source
        several = []
        for f, own in zip(self._read(drawn, cohort), query, strict=True):
            mean = metrics.multi_query_features(
                f, source.ids, source.cameras, asked.ids, asked.cameras, own
            )
            several.append(metrics.normalize_features(mean))
        return several

    def _scores(
        self,
        query: Sequence[Tensor],
        gallery: Sequence[Tensor],
        mesh: Mesh | None,
        *,
        rerank: bool = False,
        expansion: int = 0,
        ties: str = "worst",
    ) -> RetrievalScores:
        """From the features of all peers. On a mesh the ranks take turns with the peers."""
        described = list(zip(query, gallery, strict=True))
        K = len(described)
        rank, world = (0, 1) if mesh is None else (mesh.rank, mesh.world)
        found = {}
        for k in range(rank, K + (K > 1), world):
            if k < K:
                asked, among = described[k]
            else:
                asked, among = map(metrics.ensemble_features, (query, gallery))
            found[k] = self._score(asked, among, rerank, expansion, ties)
        if mesh is not None:
            found = _of_all_ranks(found, mesh)
        return RetrievalScores.of([found[k] for k in range(K)], found[K if K > 1 else 0])

    def _score(
        self, query: Tensor, gallery: Tensor, rerank: bool, expansion: int, ties: str
    ) -> metrics.ReIDScores:
        asked, among = self.query.source, self.gallery.source
        if expansion:
            query = metrics.average_query_expansion(query, gallery, expansion)
        distances = metrics.k_reciprocal_rerank(query, gallery, **RERANKING) if rerank else None
        return metrics.reid_scores(
            query,
            gallery,
            asked.ids,
            among.ids,
            asked.cameras,
            among.cameras,
            distances=distances,
            ties=ties,
            fprs=tuple(FPRS.values()),
        )


def _of_all_ranks(own: Mapping[int, ReIDScores], mesh: Mesh) -> dict[int, ReIDScores]:
    """The scores that each rank has, by peer, on all of them."""
    plain = {
        str(k): {**dataclasses.asdict(scores), "tpr": [*scores.tpr.items()]}
        for k, scores in own.items()
    }
    return {
        int(k): ReIDScores(**{**values, "tpr": dict(values["tpr"])})
        for each in mesh.gather(plain)
        for k, values in each.items()
    }


def _check_finite(names: Sequence[str], query: list[Tensor], gallery: list[Tensor]) -> None:
    for name, *features in zip(names, query, gallery, strict=True):
        if bad := sum(int((~f.isfinite()).any(dim=1).sum()) for f in features):
            raise InputError(
                f"{name}: the features of {bad} of {sum(map(len, features))} images are not "
                "finite, so there is nothing to rank: its weights are broken"
            )


def table(
    names: Sequence[str], scores: Mapping[str, dict[str, Any] | None], remark: str = ""
) -> str:
    """Every score of each peer and of the ensemble, a block of rows a protocol, from
    `Retrieval.all_scores` with RetrievalScores as dicts. remark: at the end of the last line."""
    rows: list[tuple[str, ...]] = [("peer", "query", "re-ranked", *COLUMNS.values())]
    for protocol, values in scores.items():
        if values is None:
            continue
        query = protocol.removesuffix("_reranked")
        kind = (query.replace("_", ", "), "no" if query == protocol else "yes")
        for k, name in enumerate(names):
            rows.append((name, *kind, *(percent(values[c][k]) for c in COLUMNS)))
        ensemble = (percent(values[f"ensemble_{c}"]) for c in COLUMNS)
        rows.append(("ensemble", *kind, *ensemble))
    queries = next(values["queries"] for values in scores.values() if values)
    note = f"{queries:,} queries; ensemble: the peers' features, concatenated"
    note += "; TPR: true positive rate at that false positive rate, over pairs"
    return f"{fixed_columns(rows)}\n{note}{remark}"


def _processes() -> tuple[int, int]:
    """The number of this process among those of `torch.distributed`, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _column(mesh: Mesh) -> dict[str, Any]:
    return {"rank": mesh.column, "world": mesh.data}
