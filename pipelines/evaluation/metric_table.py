"""The table of metrics: the name of each, what it requires, and how to compute it.

To add a metric, write its mathematics as a module of `lfm.metrics` and add an entry to `TABLE`. An entry computes its values
from a `Comparison`, which has the features of the generated and of the real images; with `per_pair`, its value is the
mean of a function of pairs of images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from lfm.errors import ConfigError
from lfm.metrics.frechet import Gaussian, frechet_distance, singular_warning
from lfm.metrics.inception_score import inception_score
from lfm.metrics.kid import kid
from lfm.metrics.paired import discrimination_scores, psnr, ssim
from lfm.metrics.precision_recall import density_coverage, precision_recall
from lfm.metrics.segmentation import Confusion
from pipelines.common.reference_features import ReferenceSet
from pipelines.evaluation.feature_files import FeatureFiles


@dataclass(frozen=True)
class EvaluationInputs:
    """What the metrics of an evaluation can be computed from."""

    reference_sets: list[ReferenceSet]
    provides: tuple[str, ...]  # of the candidates: pairs, segmentations, nfe
    modules: tuple[str, ...]  # lpips, segmenter


@dataclass(frozen=True)
class Comparison:
    """The feature files of one candidate, and one of the references that it is compared with."""

    files: FeatureFiles
    number: int  # of the reference's network among all networks
    reference_set: ReferenceSet

    @cached_property
    def statistics(self) -> tuple[dict[str, Gaussian], Tensor]:
        """Statistics of the candidate's features; see `FeatureFiles.statistics`."""
        return self.files.statistics(self.number)

    def features(self) -> tuple[Tensor, Tensor]:
        """Return features of a subset of the real (K, D) and of the generated images (M, D), on the network's device."""
        assert self.reference_set.reference.features is not None, "required by the entry"
        device = self.reference_set.network.device
        return self.reference_set.reference.features.to(device), self.statistics[1].to(device)

    def gaussians(self, kind: str) -> tuple[Gaussian, Gaussian]:
        """Return the Gaussians of the real and of the generated images, of `pooled` or `spatial` features."""
        return self.reference_set.reference.gaussians[kind], self.statistics[0][kind]


class Requirement(NamedTuple):
    """A condition on the inputs of an evaluation, and how a user can meet it."""

    is_met: Callable[[EvaluationInputs, ReferenceSet], bool]
    description: str


def _provides(what: str, description: str) -> Requirement:
    return Requirement(lambda inputs, _: what in inputs.provides, description)


POOLED = Requirement(lambda *_: True, "")
PUBLISHED = Requirement(
    lambda _, references: references.network.frechet == "fid",
    "the published Inception network: make the reference with `network` inception:PATH",
)
SPATIAL = Requirement(
    lambda _, references: references.network.name == "inception" and "spatial" in references.reference.gaussians,
    "the Inception network, and a reference with its spatial statistics",
)
INCEPTION = Requirement(lambda _, references: references.network.name == "inception", "the Inception network")
FEATURES = Requirement(
    lambda _, references: references.reference.features is not None,
    "a reference with features of single images, which imported ones do not have",
)
PAIRS = _provides("pairs", "`pairs`")
LPIPS = Requirement(
    lambda inputs, _: "pairs" in inputs.provides and "lpips" in inputs.modules,
    "`lpips`, and `pairs`",
)
SEGMENTER = Requirement(
    lambda inputs, _: "segmentations" in inputs.provides and "segmenter" in inputs.modules,
    "`segmenter`, and `pairs` with segmentation maps",
)
GENERATED = _provides("nfe", "a run, whose images are generated here")


@dataclass(frozen=True)
class Metric:
    """An entry of the table."""

    name: str
    requirement: Requirement
    compute: Callable[[Comparison], Mapping[str, float]]  # values by their names in the report
    per_network: bool = True  # whether the values depend on the feature network
    is_default: bool = True
    per_pair: Callable[[Tensor, Tensor], Tensor] | None = None  # uint8 (B, 3, H, W), twice -> (B,): one column


def _frechet(comparison: Comparison) -> dict[str, float]:
    return {comparison.reference_set.network.frechet: frechet_distance(*comparison.gaussians("pooled"))}


def _spatial_frechet(comparison: Comparison) -> dict[str, float]:
    return {"sfid": frechet_distance(*comparison.gaussians("spatial"))}


def _inception_score(comparison: Comparison) -> dict[str, float]:
    blocks = (block[f"{comparison.number}.probabilities"] for block in comparison.files.blocks())
    score = inception_score(blocks, comparison.files.total)
    return {"is": score.mean, "is deviation": score.deviation}


def _kid(comparison: Comparison) -> dict[str, float]:
    value = kid(*comparison.features())
    return {"kid": value.mean, "kid deviation": value.deviation}


def _precision_recall(comparison: Comparison) -> dict[str, float]:
    return dict(zip(("precision", "recall"), precision_recall(*comparison.features()), strict=True))


def _density_coverage(comparison: Comparison) -> dict[str, float]:
    return dict(zip(("density", "coverage"), density_coverage(*comparison.features()), strict=True))


def _discrimination(comparison: Comparison) -> dict[str, float]:
    real, fake = (comparison.files.column(f"{comparison.number}.{side}") for side in ("paired", "pooled"))
    scores = discrimination_scores(real, fake)
    return {"p-ids": scores.paired, "u-ids": scores.unpaired}


def _confusion(comparison: Comparison) -> dict[str, float]:
    confusion = Confusion(comparison.files.column("confusion").sum(0))
    return {"miou": confusion.mean_iou, "pixel-accuracy": confusion.pixel_accuracy}


def _per_image(
    name: str, requirement: Requirement, per_pair: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Metric:
    """Return the entry of a metric that is the mean of the column of its name."""

    def compute(comparison: Comparison) -> dict[str, float]:
        return {name: float(comparison.files.column(name).double().mean())}

    return Metric(name, requirement, compute, per_network=False, per_pair=per_pair)


# Entries with the same function are computed together: choosing one of them reports the values of all.
TABLE = (
    Metric("fd", POOLED, _frechet),
    Metric("fid", PUBLISHED, _frechet, is_default=False),  # `fd` of the published Inception network
    Metric("sfid", SPATIAL, _spatial_frechet),
    Metric("is", INCEPTION, _inception_score),
    Metric("kid", FEATURES, _kid),
    Metric("precision", FEATURES, _precision_recall),
    Metric("recall", FEATURES, _precision_recall),
    Metric("density", FEATURES, _density_coverage),
    Metric("coverage", FEATURES, _density_coverage),
    Metric("p-ids", PAIRS, _discrimination),
    Metric("u-ids", PAIRS, _discrimination),
    _per_image("psnr", PAIRS, psnr),
    _per_image("ssim", PAIRS, ssim),
    _per_image("lpips", LPIPS),
    Metric("miou", SEGMENTER, _confusion, per_network=False),
    Metric("pixel-accuracy", SEGMENTER, _confusion, per_network=False),
    _per_image("nfe", GENERATED),
    _per_image("seconds", GENERATED),
)
_USER_OF_MODULE = {"lpips": "lpips", "segmenter": "miou"}


def missing_requirement(metric: Metric, inputs: EvaluationInputs) -> str | None:
    """Return the description of what a metric requires and `inputs` lack, or None if it can be computed."""
    is_met = any(metric.requirement.is_met(inputs, reference_set) for reference_set in inputs.reference_sets)
    return None if is_met else metric.requirement.description


def choose(names: str | None, inputs: EvaluationInputs) -> list[Metric]:
    """Return the metrics of a list such as fd,kid; by default all that the inputs allow.

    Raises:
        ConfigError: If a name is unknown, a requirement of a metric is missing, or a module would not be used.
    """
    by_name = {metric.name: metric for metric in TABLE}
    for module in inputs.modules:
        if missing := missing_requirement(by_name[_USER_OF_MODULE[module]], inputs):
            raise ConfigError(f"`{module}`: needs {missing}")
    if names is None:
        return [metric for metric in TABLE if metric.is_default and not missing_requirement(metric, inputs)]
    for name in names.split(","):
        if name not in by_name:
            raise ConfigError(f"`metrics` {name}: unknown; one of {', '.join(by_name)}")
        if missing := missing_requirement(by_name[name], inputs):
            raise ConfigError(f"`metrics` {name}: needs {missing}")
    return [by_name[name] for name in names.split(",")]


def compute(metrics: list[Metric], files: FeatureFiles, inputs: EvaluationInputs) -> tuple[dict[str, float], list[str]]:
    """Return the values of metrics by their names in the report, and warnings about them."""
    comparisons = [Comparison(files, number, references) for number, references in enumerate(inputs.reference_sets)]
    values: dict[str, float] = {}
    warnings: list[str] = []
    for function in dict.fromkeys(metric.compute for metric in metrics if not metric.per_network):
        values |= function(comparisons[0])
    for comparison in comparisons:
        network = comparison.reference_set.network
        prefix = f"{network.name}: " if len(comparisons) > 1 else ""
        possible = [
            metric.compute
            for metric in metrics
            if metric.per_network and metric.requirement.is_met(inputs, comparison.reference_set)
        ]
        for function in dict.fromkeys(possible):
            values |= {prefix + name: value for name, value in function(comparison).items()}
        if _frechet in possible and (warning := singular_warning(*comparison.gaussians("pooled"))):
            warnings.append(f"{network.frechet}: {warning}")
    return values, warnings
