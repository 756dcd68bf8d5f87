"""How good samples are: distances between sets of images, in the features of a fixed network."""

from varcli.metrics.base import FeatureSet, Metric
from varcli.metrics.compute import METRICS
from varcli.metrics.density_coverage import density_coverage
from varcli.metrics.evaluate import EvalConfig, EvalResult, compute_metrics, evaluate
from varcli.metrics.features import EXTRACTORS
from varcli.metrics.fid import frechet_distance, frechet_from_stats
from varcli.metrics.inception_score import inception_score
from varcli.metrics.kid import kernel_distance
from varcli.metrics.precision_recall import precision_recall
from varcli.metrics.reconstruct import ReconstructionConfig, ReconstructionResult, evaluate_reconstruction

__all__ = [
    "EXTRACTORS",
    "METRICS",
    "EvalConfig",
    "EvalResult",
    "FeatureSet",
    "Metric",
    "ReconstructionConfig",
    "ReconstructionResult",
    "compute_metrics",
    "density_coverage",
    "evaluate",
    "evaluate_reconstruction",
    "frechet_distance",
    "frechet_from_stats",
    "inception_score",
    "kernel_distance",
    "precision_recall",
]
