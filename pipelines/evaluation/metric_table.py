"""The table of metrics: what each needs, how it is computed, its unit, and which values are better.

To add a metric, write its mathematics as a module of `lfm.metrics` and add an entry to `TABLE`; the options, the report and
its plots follow from the entry. Values are computed from a `Comparison`, which holds the features of generated and real
images. The function `per_pair` of an entry is evaluated on all pairs of images beforehand; its values are a column of the
feature files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from torch import Tensor

from lfm.errors import ConfigError
from lfm.metrics.frechet import Gaussian, frechet_distance, singular_warning
from lfm.metrics.inception_score import inception_score
from lfm.metrics.kid import kid
from lfm.metrics.memorisation import Memorisation
from lfm.metrics.paired import DiscriminationScores, discrimination_scores, psnr, ssim
from lfm.metrics.precision_recall import density_coverage, precision_recall
from lfm.metrics.segmentation import Confusion
from lfm.metrics.spread import Spread
from pipelines.common.reference_features import ReferenceSet
from pipelines.evaluation.feature_files import FeatureFiles

DEVIATION = " deviation"  # suffix of the name of a metric's standard deviation in the report

# What a metric may need, and how a user can provide it.
NEEDS = {
    "inception": "the Inception network",
    "published": "the published Inception network: make the reference with `network` inception:PATH",
    "spatial": "a reference with spatial statistics of the Inception network",
    "features": "a reference with features of single images, which imported ones do not have",
    "pairs": "`pairs`",
    "segmentations": "`pairs` with segmentation maps",
    "lpips": "`lpips`",
    "segmenter": "`segmenter`",
    "nfe": "a run, whose images are generated here",
    "training": "`nearest`",
}


@dataclass(frozen=True)
class EvaluationInputs:
    """What the metrics of an evaluation can be computed from."""

    reference_sets: list[ReferenceSet]
    provides: tuple[str, ...]  # of the candidates: pairs, segmentations, nfe, training
    modules: tuple[str, ...]  # lpips, segmenter

    def available(self, reference_set: ReferenceSet) -> set[str]:
        """Return the keys of `NEEDS` that a comparison with one of the references provides."""
        network, reference = reference_set.network, reference_set.reference
        conditions = {
            "inception": network.name == "inception",
            "published": network.frechet == "fid",
            "spatial": network.name == "inception" and "spatial" in reference.gaussians,
            "features": reference.features is not None,
        }
        return {*self.provides, *self.modules, *(key for key, is_met in conditions.items() if is_met)}


@dataclass(frozen=True)
class Comparison:
    """The feature files of one candidate, and one of the references that it is compared with."""

    files: FeatureFiles
    number: int  # of the reference's network among all networks
    reference_set: ReferenceSet
    memorisation: Mapping[str, Memorisation] = field(default_factory=dict)  # by space; empty without training samples

    @cached_property
    def statistics(self) -> tuple[dict[str, Gaussian], Tensor]:
        """Statistics of the candidate's features; see `FeatureFiles.statistics`."""
        return self.files.statistics(self.number)

    @cached_property
    def features(self) -> tuple[Tensor, Tensor]:
        """Features of a subset of the real (K, D) and of the generated images (M, D), on the network's device."""
        assert self.reference_set.reference.features is not None, "needed by the entry"
        device = self.reference_set.network.device
        return self.reference_set.reference.features.to(device), self.statistics[1].to(device)

    def gaussians(self, kind: str) -> tuple[Gaussian, Gaussian]:
        """Return the Gaussians of the real and of the generated images, of `pooled` or `spatial` features."""
        return self.reference_set.reference.gaussians[kind], self.statistics[0][kind]

    # Results that several metrics share.

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
class Metric:
    """An entry of the table."""

    name: str
    better: Literal["lower", "higher"]
    needs: set[str]
    compute: Callable[[Comparison], float | Spread]
    unit: str | None = None
    per_network: bool = True  # whether the value depends on the feature network
    is_default: bool = True
    per_pair: Callable[[Tensor, Tensor], Tensor] | None = None  # uint8 (B, 3, H, W), twice -> (B,)

    def missing(self, inputs: EvaluationInputs) -> str | None:
        """Return the description of what the metric needs and no reference provides, or None if it can be computed."""
        missing = min((self.needs - inputs.available(each) for each in inputs.reference_sets), key=len)
        return ", and ".join(NEEDS[key] for key in sorted(missing)) or None


def _frechet(comparison: Comparison) -> float:
    return frechet_distance(*comparison.gaussians("pooled"))


def _spatial_frechet(comparison: Comparison) -> float:
    return frechet_distance(*comparison.gaussians("spatial"))


def _inception_score(comparison: Comparison) -> Spread:
    blocks = (block[f"{comparison.number}.probabilities"] for block in comparison.files.blocks())
    return inception_score(blocks, comparison.files.total)


def _mean_of(column: str) -> Callable[[Comparison], float]:
    return lambda comparison: float(comparison.files.column(column).double().mean())


def _memorised(space: str) -> Callable[[Comparison], float]:
    return lambda comparison: 100 * comparison.memorisation[space].memorised


def _ratio(space: str) -> Callable[[Comparison], float]:
    return lambda comparison: comparison.memorisation[space].ratio


TABLE = (
    Metric("fd", "lower", set(), _frechet),
    Metric("fid", "lower", {"published"}, _frechet, is_default=False),
    Metric("sfid", "lower", {"spatial"}, _spatial_frechet),
    Metric("is", "higher", {"inception"}, _inception_score),
    Metric("kid", "lower", {"features"}, lambda comparison: kid(*comparison.features)),
    Metric("precision", "higher", {"features"}, lambda comparison: comparison.precision_recall[0]),
    Metric("recall", "higher", {"features"}, lambda comparison: comparison.precision_recall[1]),
    Metric("density", "higher", {"features"}, lambda comparison: comparison.density_coverage[0]),
    Metric("coverage", "higher", {"features"}, lambda comparison: comparison.density_coverage[1]),
    Metric("p-ids", "higher", {"pairs"}, lambda comparison: comparison.discrimination.paired),
    Metric("u-ids", "higher", {"pairs"}, lambda comparison: comparison.discrimination.unpaired),
    Metric("psnr", "higher", {"pairs"}, _mean_of("psnr"), "dB", per_network=False, per_pair=psnr),
    Metric("ssim", "higher", {"pairs"}, _mean_of("ssim"), per_network=False, per_pair=ssim),
    Metric("lpips", "lower", {"lpips", "pairs"}, _mean_of("lpips"), per_network=False),
    Metric(
        "miou",
        "higher",
        {"segmenter", "segmentations"},
        lambda comparison: comparison.confusion.mean_iou,
        per_network=False,
    ),
    Metric(
        "pixel-accuracy",
        "higher",
        {"segmenter", "segmentations"},
        lambda comparison: comparison.confusion.pixel_accuracy,
        per_network=False,
    ),
    Metric("memorised-features", "lower", {"training"}, _memorised("features"), "%", per_network=False),
    Metric("memorised-latents", "lower", {"training"}, _memorised("latents"), "%", per_network=False),
    Metric("ratio-features", "higher", {"training"}, _ratio("features"), per_network=False),
    Metric("ratio-latents", "higher", {"training"}, _ratio("latents"), per_network=False),
    Metric("nfe", "lower", {"nfe"}, _mean_of("nfe"), per_network=False),
    Metric("seconds", "lower", {"nfe"}, _mean_of("seconds"), "s", per_network=False),
)


def choose(names: str | None, inputs: EvaluationInputs) -> list[Metric]:
    """Return the metrics of a list such as fd,kid; by default all that the inputs allow.

    Raises:
        ConfigError: If a name is unknown, a metric cannot be computed, or a module would not be used.
    """
    for metric in TABLE:
        for module in metric.needs.intersection(inputs.modules):
            if missing := metric.missing(inputs):
                raise ConfigError(f"`{module}`: needs {missing}")
    if names is None:
        return [metric for metric in TABLE if metric.is_default and not metric.missing(inputs)]
    by_name = {metric.name: metric for metric in TABLE}
    for name in names.split(","):
        if name not in by_name:
            raise ConfigError(f"`metrics` {name}: unknown; one of {', '.join(by_name)}")
        if missing := by_name[name].missing(inputs):
            raise ConfigError(f"`metrics` {name}: needs {missing}")
    return [by_name[name] for name in names.split(",")]


class Results(NamedTuple):
    """Metrics of a candidate, by their names in the report."""

    values: dict[str, float]
    descriptions: dict[str, dict[str, str | None]]  # unit, and whether lower or higher values are better
    warnings: list[str]


def compute(
    metrics: list[Metric],
    files: FeatureFiles,
    inputs: EvaluationInputs,
    memorisation: Mapping[str, Memorisation] | None = None,
) -> Results:
    """Compute metrics of a candidate from its feature files, and from how near its images are to training samples."""
    comparisons = [
        Comparison(files, number, references, memorisation or {})
        for number, references in enumerate(inputs.reference_sets)
    ]
    results = Results({}, {}, [])
    for name, metric, comparison in _computations(metrics, comparisons, inputs):
        value = metric.compute(comparison)
        results.values[name] = value.mean if isinstance(value, Spread) else value
        if isinstance(value, Spread):
            results.values[name + DEVIATION] = value.deviation
        results.descriptions[name] = {"unit": metric.unit, "better": metric.better}
        if metric.compute is _frechet and (warning := singular_warning(*comparison.gaussians("pooled"))):
            results.warnings.append(f"{comparison.reference_set.network.frechet}: {warning}")
    return results


def _computations(
    metrics: list[Metric], comparisons: list[Comparison], inputs: EvaluationInputs
) -> Iterator[tuple[str, Metric, Comparison]]:
    """Yield each value to compute: its name in the report, its metric, and the comparison that it is computed from.

    A Frechet distance is reported under the name that belongs to its network, such as fid or fd-lite.
    """
    for metric in metrics:
        if not metric.per_network:
            yield metric.name, metric, comparisons[0]
    for comparison in comparisons:
        network = comparison.reference_set.network
        prefix = f"{network.name}: " if len(comparisons) > 1 else ""
        for metric in metrics:
            if metric.per_network and metric.needs <= inputs.available(comparison.reference_set):
                name = network.frechet if metric.compute is _frechet else metric.name
                yield prefix + name, metric, comparison
