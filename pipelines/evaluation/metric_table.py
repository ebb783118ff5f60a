"""The table of metrics: what each requires, how it is computed, its unit, and which values are better.

To add a metric, write its mathematics as a module of `lfm.metrics` and add an entry to `TABLE`; the options, the report and
its plots follow from the entry. Values are computed from a `Comparison`, which holds the features of generated and real
images. The value of an entry with `per_pair` is the mean of a function of pairs of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from torch import Tensor

from lfm.errors import ConfigError
from lfm.metrics.frechet import Gaussian, frechet_distance, singular_warning
from lfm.metrics.inception_score import inception_score
from lfm.metrics.kid import kid
from lfm.metrics.paired import DiscriminationScores, discrimination_scores, psnr, ssim
from lfm.metrics.precision_recall import density_coverage, precision_recall
from lfm.metrics.segmentation import Confusion
from pipelines.common.reference_features import ReferenceSet
from pipelines.evaluation.feature_files import FeatureFiles

DEVIATION = " deviation"  # suffix of the name of a metric's standard deviation in the report


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

    @cached_property
    def features(self) -> tuple[Tensor, Tensor]:
        """Features of a subset of the real (K, D) and of the generated images (M, D), on the network's device."""
        assert self.reference_set.reference.features is not None, "required by the entry"
        device = self.reference_set.network.device
        return self.reference_set.reference.features.to(device), self.statistics[1].to(device)

    def gaussians(self, kind: str) -> tuple[Gaussian, Gaussian]:
        """Return the Gaussians of the real and of the generated images, of `pooled` or `spatial` features."""
        return self.reference_set.reference.gaussians[kind], self.statistics[0][kind]

    # Results that several metrics share.

    @cached_property
    def frechet(self) -> float:
        """Frechet distance of the pooled features."""
        return frechet_distance(*self.gaussians("pooled"))

    @cached_property
    def precision_recall(self) -> tuple[float, float]:
        """Precision and recall."""
        return precision_recall(*self.features)

    @cached_property
    def density_coverage(self) -> tuple[float, float]:
        """Density and coverage."""
        return density_coverage(*self.features)

    @cached_property
    def discrimination(self) -> DiscriminationScores:
        """P-IDS and U-IDS."""
        real, fake = (self.files.column(f"{self.number}.{side}") for side in ("paired", "pooled"))
        return discrimination_scores(real, fake)

    @cached_property
    def confusion(self) -> Confusion:
        """Agreement of the segmenter's predictions with the segmentation maps."""
        return Confusion(self.files.column("confusion").sum(0))


@dataclass(frozen=True)
class Requirement:
    """A condition on the inputs of an evaluation, and how a user can meet it."""

    description: str
    provides: str | None = None  # by the candidates
    module: str | None = None
    is_met_by: Callable[[ReferenceSet], bool] = lambda _: True

    def is_met(self, inputs: EvaluationInputs, reference_set: ReferenceSet) -> bool:
        """Return whether an evaluation can compare its images with this reference."""
        return (
            self.provides in (None, *inputs.provides)
            and self.module in (None, *inputs.modules)
            and self.is_met_by(reference_set)
        )


POOLED = Requirement("a reference")
PUBLISHED = Requirement(
    "the published Inception network: make the reference with `network` inception:PATH",
    is_met_by=lambda references: references.network.frechet == "fid",
)
INCEPTION = Requirement("the Inception network", is_met_by=lambda references: references.network.name == "inception")
SPATIAL = Requirement(
    "the Inception network, and a reference with its spatial statistics",
    is_met_by=lambda references: INCEPTION.is_met_by(references) and "spatial" in references.reference.gaussians,
)
FEATURES = Requirement(
    "a reference with features of single images, which imported ones do not have",
    is_met_by=lambda references: references.reference.features is not None,
)
PAIRS = Requirement("`pairs`", provides="pairs")
LPIPS = Requirement("`lpips`, and `pairs`", provides="pairs", module="lpips")
SEGMENTER = Requirement("`segmenter`, and `pairs` with segmentation maps", provides="segmentations", module="segmenter")
GENERATED = Requirement("a run, whose images are generated here", provides="nfe")


class Spread(NamedTuple):
    """The mean of several estimates of a metric, and their standard deviation."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class Metric:
    """An entry of the table."""

    name: str
    better: Literal["lower", "higher"]
    requirement: Requirement
    compute: Callable[[Comparison], float | Spread]
    unit: str | None = None
    per_network: bool = True  # whether the value depends on the feature network
    is_default: bool = True
    per_pair: Callable[[Tensor, Tensor], Tensor] | None = None  # uint8 (B, 3, H, W), twice -> (B,): one column

    def report_name(self, comparison: Comparison) -> str:
        """Return the name in the report: that of the metric, except for the Frechet distance of a network."""
        return comparison.reference_set.network.frechet if self.name in ("fd", "fid") else self.name


def _spatial_frechet(comparison: Comparison) -> float:
    return frechet_distance(*comparison.gaussians("spatial"))


def _inception_score(comparison: Comparison) -> Spread:
    blocks = (block[f"{comparison.number}.probabilities"] for block in comparison.files.blocks())
    return Spread(*inception_score(blocks, comparison.files.total))


def _kid(comparison: Comparison) -> Spread:
    return Spread(*kid(*comparison.features))


def _per_image(
    name: str,
    better: Literal["lower", "higher"],
    requirement: Requirement,
    unit: str | None = None,
    per_pair: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Metric:
    """Return the entry of a metric that is the mean of the column of its name."""

    def compute(comparison: Comparison) -> float:
        return float(comparison.files.column(name).double().mean())

    return Metric(name, better, requirement, compute, unit, per_network=False, per_pair=per_pair)


TABLE = (
    Metric("fd", "lower", POOLED, lambda comparison: comparison.frechet),
    Metric("fid", "lower", PUBLISHED, lambda comparison: comparison.frechet, is_default=False),
    Metric("sfid", "lower", SPATIAL, _spatial_frechet),
    Metric("is", "higher", INCEPTION, _inception_score),
    Metric("kid", "lower", FEATURES, _kid),
    Metric("precision", "higher", FEATURES, lambda comparison: comparison.precision_recall[0]),
    Metric("recall", "higher", FEATURES, lambda comparison: comparison.precision_recall[1]),
    Metric("density", "higher", FEATURES, lambda comparison: comparison.density_coverage[0]),
    Metric("coverage", "higher", FEATURES, lambda comparison: comparison.density_coverage[1]),
    Metric("p-ids", "higher", PAIRS, lambda comparison: comparison.discrimination.paired),
    Metric("u-ids", "higher", PAIRS, lambda comparison: comparison.discrimination.unpaired),
    _per_image("psnr", "higher", PAIRS, unit="dB", per_pair=psnr),
    _per_image("ssim", "higher", PAIRS, per_pair=ssim),
    _per_image("lpips", "lower", LPIPS),
    Metric("miou", "higher", SEGMENTER, lambda comparison: comparison.confusion.mean_iou, per_network=False),
    Metric(
        "pixel-accuracy", "higher", SEGMENTER, lambda comparison: comparison.confusion.pixel_accuracy, per_network=False
    ),
    _per_image("nfe", "lower", GENERATED),
    _per_image("seconds", "lower", GENERATED, unit="s"),
)


def missing_requirement(metric: Metric, inputs: EvaluationInputs) -> str | None:
    """Return the description of what a metric requires and `inputs` lack, or None if it can be computed."""
    is_met = any(metric.requirement.is_met(inputs, reference_set) for reference_set in inputs.reference_sets)
    return None if is_met else metric.requirement.description


def choose(names: str | None, inputs: EvaluationInputs) -> list[Metric]:
    """Return the metrics of a list such as fd,kid; by default all that the inputs allow.

    Raises:
        ConfigError: If a name is unknown, a requirement of a metric is missing, or a module would not be used.
    """
    for metric in TABLE:
        module = metric.requirement.module
        if module in inputs.modules and (missing := missing_requirement(metric, inputs)):
            raise ConfigError(f"`{module}`: needs {missing}")
    if names is None:
        return [metric for metric in TABLE if metric.is_default and not missing_requirement(metric, inputs)]
    by_name = {metric.name: metric for metric in TABLE}
    for name in names.split(","):
        if name not in by_name:
            raise ConfigError(f"`metrics` {name}: unknown; one of {', '.join(by_name)}")
        if missing := missing_requirement(by_name[name], inputs):
            raise ConfigError(f"`metrics` {name}: needs {missing}")
    return [by_name[name] for name in names.split(",")]


class Results(NamedTuple):
    """Metrics of a candidate, by their names in the report."""

    values: dict[str, float]
    descriptions: dict[str, dict[str, str | None]]  # unit, and whether lower or higher values are better
    warnings: list[str]


def compute(metrics: list[Metric], files: FeatureFiles, inputs: EvaluationInputs) -> Results:
    """Compute metrics of a candidate from its feature files."""
    comparisons = [Comparison(files, number, references) for number, references in enumerate(inputs.reference_sets)]
    results = Results({}, {}, [])
    for name, metric, comparison in _computations(metrics, comparisons, inputs):
        value = metric.compute(comparison)
        results.values[name] = value.mean if isinstance(value, Spread) else value
        if isinstance(value, Spread):
            results.values[name + DEVIATION] = value.deviation
        results.descriptions[name] = {"unit": metric.unit, "better": metric.better}
        if metric.name in ("fd", "fid") and (warning := singular_warning(*comparison.gaussians("pooled"))):
            results.warnings.append(f"{comparison.reference_set.network.frechet}: {warning}")
    return results


def _computations(
    metrics: list[Metric], comparisons: list[Comparison], inputs: EvaluationInputs
) -> Iterator[tuple[str, Metric, Comparison]]:
    """Yield each value to compute: its name in the report, its metric, and the comparison that it is computed from."""
    for metric in metrics:
        if not metric.per_network:
            yield metric.name, metric, comparisons[0]
    for comparison in comparisons:
        prefix = f"{comparison.reference_set.network.name}: " if len(comparisons) > 1 else ""
        for metric in metrics:
            if metric.per_network and metric.requirement.is_met(inputs, comparison.reference_set):
                yield prefix + metric.report_name(comparison), metric, comparison
