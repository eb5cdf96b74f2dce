"""What mutual learning changes in trained peers: how flat their minima are, what lies between them,
how alike their features are, how sure they are, and where they agree.

Each analysis is a function that gives a frozen dataclass of plain values, with `to_dict`, and has a
function of its own that draws it. They take networks of any origin and batches (inputs, labels);
`analyse` reads the folder of a run. Names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdml.analysis.agreement import (
        PeerAgreement,
        agreement_of,
        peer_agreement,
        plot_agreement,
    )
    from fastdml.analysis.alignment import (
        KernelAlignment,
        kernel_alignment,
        linear_cka,
        plot_kernel_alignment,
    )
    from fastdml.analysis.calibration import (
        CalibrationScores,
        PeersTemperatureScaling,
        TemperatureScaling,
        calibration_scores,
        fit_temperature,
        peers_temperature_scaling,
        plot_reliability,
        plot_temperature_scaling,
        temperature_scaling,
    )
    from fastdml.analysis.confusion import ConfusionMatrix, confusion_matrix, plot_confusion
    from fastdml.analysis.divergence import PairwiseKL, pairwise_kl, plot_pairwise_kl
    from fastdml.analysis.from_predictions import analyse_predictions
    from fastdml.analysis.gains import (
        Gains,
        gains_by_class,
        gains_by_confidence,
        gains_by_group,
        gains_by_noise,
        gains_by_noise_level,
        plot_gains,
    )
    from fastdml.analysis.posteriors import Posterior, plot_posterior, posterior
    from fastdml.analysis.run import (
        RunPeers,
        flat_minima_of_run,
        peers_of_run,
        posterior_of_run,
    )
    from fastdml.analysis.run_analyses import analyse, current_analyses
    from fastdml.analysis.sections import (
        LossPlane,
        LossSection,
        loss_plane,
        loss_section,
        plot_loss_plane,
        plot_loss_section,
    )
    from fastdml.analysis.weight_noise import FlatMinima, flat_minima, plot_flat_minima
    from fastdml.report.statistics import Reliability, reliability

_HOMES = {
    "CalibrationScores": "calibration",
    "ConfusionMatrix": "confusion",
    "FlatMinima": "weight_noise",
    "Gains": "gains",
    "KernelAlignment": "alignment",
    "LossPlane": "sections",
    "LossSection": "sections",
    "PairwiseKL": "divergence",
    "PeerAgreement": "agreement",
    "PeersTemperatureScaling": "calibration",
    "Posterior": "posteriors",
    "Reliability": "calibration",
    "RunPeers": "run",
    "TemperatureScaling": "calibration",
    "agreement_of": "agreement",
    "analyse": "run_analyses",
    "analyse_predictions": "from_predictions",
    "calibration_scores": "calibration",
    "confusion_matrix": "confusion",
    "current_analyses": "run_analyses",
    "fit_temperature": "calibration",
    "flat_minima": "weight_noise",
    "flat_minima_of_run": "run",
    "gains_by_class": "gains",
    "gains_by_confidence": "gains",
    "gains_by_group": "gains",
    "gains_by_noise": "gains",
    "gains_by_noise_level": "gains",
    "kernel_alignment": "alignment",
    "linear_cka": "alignment",
    "loss_plane": "sections",
    "loss_section": "sections",
    "pairwise_kl": "divergence",
    "peer_agreement": "agreement",
    "peers_of_run": "run",
    "peers_temperature_scaling": "calibration",
    "plot_agreement": "agreement",
    "plot_confusion": "confusion",
    "plot_flat_minima": "weight_noise",
    "plot_gains": "gains",
    "plot_kernel_alignment": "alignment",
    "plot_loss_plane": "sections",
    "plot_loss_section": "sections",
    "plot_pairwise_kl": "divergence",
    "plot_posterior": "posteriors",
    "plot_reliability": "calibration",
    "plot_temperature_scaling": "calibration",
    "posterior": "posteriors",
    "posterior_of_run": "run",
    "reliability": "calibration",
    "temperature_scaling": "calibration",
}

__all__ = [
    "CalibrationScores",
    "ConfusionMatrix",
    "FlatMinima",
    "Gains",
    "KernelAlignment",
    "LossPlane",
    "LossSection",
    "PairwiseKL",
    "PeerAgreement",
    "PeersTemperatureScaling",
    "Posterior",
    "Reliability",
    "RunPeers",
    "TemperatureScaling",
    "agreement_of",
    "analyse",
    "analyse_predictions",
    "calibration_scores",
    "confusion_matrix",
    "current_analyses",
    "fit_temperature",
    "flat_minima",
    "flat_minima_of_run",
    "gains_by_class",
    "gains_by_confidence",
    "gains_by_group",
    "gains_by_noise",
    "gains_by_noise_level",
    "kernel_alignment",
    "linear_cka",
    "loss_plane",
    "loss_section",
    "pairwise_kl",
    "peer_agreement",
    "peers_of_run",
    "peers_temperature_scaling",
    "plot_agreement",
    "plot_confusion",
    "plot_flat_minima",
    "plot_gains",
    "plot_kernel_alignment",
    "plot_loss_plane",
    "plot_loss_section",
    "plot_pairwise_kl",
    "plot_posterior",
    "plot_reliability",
    "plot_temperature_scaling",
    "posterior",
    "posterior_of_run",
    "reliability",
    "temperature_scaling",
]


if not TYPE_CHECKING:  # a type checker would take any name to be there

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(importlib.import_module(f"fastdml.analysis.{_HOMES[name]}"), name)
        raise AttributeError(f"module 'fastdml.analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
