"""Re-identification: peers whose features find a person again, judged by retrieval."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fastdml.cohort import Cohort
from fastdml.data import (
    HINT,
    ImageFolderReID,
    Market1501,
    PKSampler,
    choose_loader,
    dataset,
    load_cifar100,
    make_loader,
)
from fastdml.data.loaders.dali import checked
from fastdml.data.loaders.torch_workers import naming_dead_workers
from fastdml.data.reid_validation import hold_out_identities
from fastdml.data.sets.stand_in import StandIn, build_standin
from fastdml.engine.amp import Amp
from fastdml.errors import InputError
from fastdml.logs import held
from fastdml.loss import MutualLoss
from fastdml.metric_losses import MetricLoss
from fastdml.metrics import TIES, ClassificationScores
from fastdml.models import ReidHead
from fastdml.report.scoring import Headline, Scoring
from fastdml.train.batches import Batches
from fastdml.train.config.reid import METRIC_WEIGHTS, ReidConfig, reid_preset
from fastdml.train.run_folder import needs_pretrained
from fastdml.train.tasks import classification
from fastdml.train.tasks.retrieval import RERANKING, Retrieval, RetrievalScores, table
from fastdml.train.tasks.task import (
    Evaluation,
    Prepared,
    Task,
    register_task,
)

logger = logging.getLogger(__name__)

HEAD = ("pooling", "neck", "last_stride")  # settings that a cohort records too
STANDIN_FOLDER = "market1501-standin"  # below the root
STANDIN = StandIn(train_images=200)

SCORING = Scoring(
    RetrievalScores,
    (
        Headline("mAP", label="mAP", entry="mAP", title="mAP"),
        Headline("rank1", label="rank-1", entry="rank1", title="rank-1", cases="queries"),
    ),
    ensemble="the mutual peers' features, concatenated",
)


@register_task
class Reidentification(Task):
    name, title = "reid", "re-identification"
    settings = ReidConfig
    scoring = SCORING
    choices = ("recipe", "standin")
    shown_by_loader = frozenset(["erasing", "images_per_id"])
    defaults_of_fit = frozenset(["standin", "height", "width"])
    options = MappingProxyType(
        {
            "--no-rerank": {
                "action": "store_true",
                "help": "leave out the scores after re-ranking",
            },
            "--distractors": {
                "action": "store_true",
                "help": "add the 500k distractors to the gallery",
            },
            "--ranked-lists": {
                "type": int,
                "default": 0,
                "metavar": "N",
                "help": "draw N queries and what each peer finds for them, into RUN/ranked_lists",
            },
            "--query-expansion": {
                "type": int,
                "default": 0,
                "metavar": "N",
                "help": "score also queries that are averaged with their N nearest gallery images",
            },
            "--ties": {
                "choices": TIES,
                "default": "worst",
                "help": "how images at equal distance rank: worst, against the peer, whatever "
                "their order; given, in the gallery's order (default: worst)",
            },
        }
    )
    in_python = "fastdml.train.extract_features and fastdml.metrics.reid_scores score it"

    def preset(self, data: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
        return reid_preset(data, chosen)

    @contextmanager
    def prepare(
        self,
        config: ReidConfig,
        device: torch.device,
        hint: str = HINT,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Prepared]:
        with opened(config, hint=hint) as market:
            yield prepare(market, config, device, rank, world)

    def recorded(self, cohort: Cohort, train: Batches, images: Tensor) -> dict[str, Any]:
        """Sizes, sampling and augmentation of what ran, and the peers' head."""
        if images.dim() != 4:
            raise InputError(
                "re-identification learns from images (N, channels, H, W), not from inputs "
                f"{tuple(images.shape)}: give a TrainConfig for classification"
            )
        sampler, augment = getattr(train, "sampler", None), getattr(train, "augment", None)
        found = {
            "standin": False,
            "height": images.shape[2],
            "width": images.shape[3],
            "images_per_id": getattr(sampler, "k", 0),
            "erasing": float(getattr(augment, "erase", 0.0)),
        }
        if cohort.head is not None:
            found |= {name: getattr(cohort.head, name) for name in HEAD}
        return found

    def mutual_loss(self, config: ReidConfig, K: int, **options: Any) -> MutualLoss:
        summed = torch.ones(K, K) if config.kl_sum else None  # the default is the mean
        return super().mutual_loss(config, K, peer_weights=summed, **options)

    def metric_loss(self, config: ReidConfig, cohort: Cohort) -> MetricLoss | None:
        """The losses on features that `config` gives a weight to; None: none."""
        if not any(getattr(config, name) for name in METRIC_WEIGHTS):
            return None
        return MetricLoss(
            triplet=config.triplet_weight,
            margin=config.margin,
            center=config.center_weight,
            circle=config.circle_weight,
            distance_mutual=config.distance_mutual_weight,
            num_classes=cohort.num_classes,
            # a peer without a head has no features; the step says so
            dims=[getattr(peer, "num_features", 0) for peer in cohort.peers],
        )

    def score(self, cohort: Cohort, test: Batches, amp: Amp) -> ClassificationScores:
        """Accuracy on batches (images, labels) of identities that the peers were trained on."""
        return classification.score(cohort, test, amp)

    def evaluate(
        self,
        cohort: Cohort,
        config: ReidConfig,
        device: torch.device,
        options: Mapping[str, Any],
        *,
        run: Path,
        hint: str = HINT,
    ) -> Evaluation:
        count, distractors = options["ranked_lists"], options["distractors"]
        expansion, ties = options["query_expansion"], options["ties"]
        for name, number in (("--ranked-lists", count), ("--query-expansion", expansion)):
            if number < 0:
                raise InputError(f"{name} {number}: give 0 or more")
        with (
            naming_dead_workers(),
            held() as show,
            opened(config, distractors=distractors, hint=hint) as market,
        ):
            retrieval = Retrieval(market, config, device)
            show()
            found, query, gallery = retrieval.all_scores(
                cohort.eval(), not options["no_rerank"], expansion=expansion, ties=ties
            )
            pictures = []
            if count:
                folder = run / "ranked_lists"
                pictures = retrieval.draw(cohort, query, gallery, count, folder, ties)
            expansion = min(expansion, len(market.gallery))
        scores = {name: dataclasses.asdict(s) if s else None for name, s in found.items()}
        settings = {
            "metric": "cosine",
            "flip_test": config.flip_test,
            "ties": ties,
            "query_expansion": {"n": expansion, "alpha": 0.0} if expansion else None,
            "reranking": None if options["no_rerank"] else RERANKING,
            "distractors": distractors,
        }
        remark = f"; expanded: by their {expansion} nearest gallery images" if expansion else ""
        if ties != "worst":
            remark += f"; ties: {ties}"
        if isinstance(market, Market1501) and market.multi_query is None:
            remark += "; no multiple queries: the folder gt_bbox is not there"
        return Evaluation(scores, table(cohort.names, scores, remark), pictures, settings)


@contextmanager
def opened(
    config: ReidConfig, *, distractors: bool = False, hint: str = HINT
) -> Iterator[ImageFolderReID]:
    """The data set of a run, checked; oddities are logged. With `standin` it is built where it is
    missing, for a dry run in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="fastdml-") as temporary:
        root = Path(config.root)
        if config.standin:
            if config.download and not config.dry_run:
                load_cifar100(root, download=True, hint=hint)
            folder = root / STANDIN_FOLDER
            build = Path(temporary) if config.dry_run and not folder.exists() else folder
            root = build_standin(build, config.root, STANDIN, hint)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            market = _loaded(config, root, distractors)
        for warning in caught:
            if warning.category is UserWarning and not config.standin:
                logger.warning(str(warning.message))
        _check_queries(market)
        yield market


def _loaded(config: ReidConfig, root: Path, distractors: bool) -> ImageFolderReID:
    load = dataset(config.data, "reid").load
    options: dict[str, Any] = {
        "bad_files": config.bad_files,
        "progress": config.progress or None,
    }
    if load is Market1501:
        options["distractors"] = distractors
    elif distractors:
        raise InputError(f"--distractors: {config.data} has none, market1501 does: leave it out")
    else:  # files of many sizes: decoded to what the peers take
        options["size"] = config.size
    if config.pattern:
        options["pattern"] = config.pattern
    return load(root, **options)


def _check_queries(market: ImageFolderReID) -> None:
    """Raises InputError where no query has a match in the gallery, which evaluation would find only
    after epochs of training."""
    gallery, query = market.gallery, market.query
    places = set(zip(gallery.ids.tolist(), gallery.cameras.tolist(), strict=True))
    cameras: dict[int, set[int]] = {}
    for identity, camera in places:
        cameras.setdefault(identity, set()).add(camera)
    asked = zip(query.ids.tolist(), query.cameras.tolist(), strict=True)
    if not any(cameras.get(identity, set()) - {camera} for identity, camera in asked):
        raise InputError(
            f"{market.root}: no query has a gallery image of its identity from another camera, so "
            "nothing can be found: check the cameras in the files' names"
        )


def prepare(
    market: ImageFolderReID,
    config: ReidConfig,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> Prepared:
    """The peers, training batches and evaluation of a run. rank, world: as of `Task.prepare`."""
    split, validation = market.train, None
    share: dict[str, Any] = {"rank": rank, "world": world}
    if config.validation:
        split, held_out = hold_out_identities(split, config.validation, config.seed)
        validation = Retrieval(held_out, config, device, **share)
    if config.subset:
        split = split.subset(config.subset, config.seed)
    options: dict[str, Any] = {
        "train": True,
        "size": config.size,
        "pad": config.pad,
        "padding": "black",
        "flip": config.flip,
        "erase": config.erasing,
    }
    kind = choose_loader(config.loader, split, device, policy=config.policy, **options)
    if kind == "dali":  # what it cannot decode must not be sampled
        split = checked(split, config.bad_files)
    sampler = None
    if config.images_per_id:
        of_each = config.images_per_id
        sampler = PKSampler(split.ids, config.batch_size // of_each, of_each)
    cohort = Cohort(
        config.peers,
        split.num_classes,
        seed=config.seed,
        head=ReidHead(config.pooling, config.neck, config.last_stride),
        pretrained=needs_pretrained(config),
        image_size=config.size,
    )
    train = make_loader(
        kind,
        split,
        config.batch_size,
        seed=config.seed,
        sampler=sampler,
        policy=config.policy,
        device=device,
        **share,
        **options,
    )
    return Prepared(cohort, train, Retrieval(market, config, device, **share), validation)
