"""From the blocks of a feature pass and a reference to the metrics, by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lfm.errors import ConfigError
from lfm.metrics.features import FeatureNetwork
from lfm.metrics.frechet import frechet_distance, singular_warning
from lfm.metrics.inception_score import inception_score
from lfm.metrics.kid import kid
from lfm.metrics.paired import discrimination_scores
from lfm.metrics.precision_recall import density_coverage, precision_recall
from lfm.metrics.reference import Reference
from lfm.metrics.segmentation import Confusion
from pipelines.evaluation import feature_files

OF_NETWORKS = ("fd", "fid", "sfid", "is", "kid", "precision", "recall", "density", "coverage", "p-ids", "u-ids")
OF_PIXELS = ("psnr", "ssim", "lpips", "miou", "pixel-accuracy", "nfe", "seconds")


@dataclass(frozen=True)
class EvaluationInputs:
    """What there is to measure with."""

    references: list[Reference]
    networks: list[FeatureNetwork]
    offers: tuple[str, ...]  # of the targets: pairs, maps, nfe
    modules: tuple[str, ...]  # lpips, segmenter

    def lack(self, metric: str) -> str | None:
        """What a metric needs and is not there; None where it can be had."""
        inception = any(network.name == "inception" for network in self.networks)
        spatial = inception and any("spatial" in reference.gaussians for reference in self.references)
        kept = any(reference.features is not None for reference in self.references)
        published = any(network.frechet == "fid" for network in self.networks)
        features, pairs = "a reference with features, which imported ones have not", "pairs" in self.offers
        segmenter = ("segmenter" in self.modules and "maps" in self.offers, "--segmenter, and --pairs with maps")
        there, needed = {
            "fid": (published, "the published Inception network: make the reference with --network inception:PATH"),
            "sfid": (spatial, "the Inception network, and a reference with its spatial statistics"),
            "is": (inception, "the Inception network"),
            **dict.fromkeys(("kid", "precision", "recall", "density", "coverage"), (kept, features)),
            **dict.fromkeys(("p-ids", "u-ids", "psnr", "ssim"), (pairs, "--pairs")),
            "lpips": (pairs and "lpips" in self.modules, "--lpips, and --pairs"),
            **dict.fromkeys(("miou", "pixel-accuracy"), segmenter),
            **dict.fromkeys(("nfe", "seconds"), ("nfe" in self.offers, "a run, whose images are generated here")),
        }.get(metric, (True, ""))
        return None if there else needed

    def choose(self, names: str | None) -> tuple[str, ...]:
        """The metrics of a list such as fd,kid; all that can be had where there is no list.

        Raises:
            ConfigError: one is unknown, or cannot be had; or a module would not be used.
        """
        known = (*OF_NETWORKS, *OF_PIXELS)
        for module, metric in (("lpips", "lpips"), ("segmenter", "miou")):
            if module in self.modules and (lack := self.lack(metric)):
                raise ConfigError(f"--{module}: needs {lack}")
        if names is None:
            return tuple(name for name in known if name != "fid" and not self.lack(name))
        for name in names.split(","):
            if name not in known:
                raise ConfigError(f"--metrics {name}: unknown; of {', '.join(known)}")
            if lack := self.lack(name):
                raise ConfigError(f"--metrics {name}: needs {lack}")
        return tuple(names.split(","))


def of_network(
    folder: str, counts: tuple[int, ...], number: int, means: EvaluationInputs, chosen: tuple[str, ...]
) -> tuple[dict[str, float], list[str]]:
    """The chosen metrics on the features of one network, and warnings about them."""
    reference, network = means.references[number], means.networks[number]
    gaussians, fake = feature_files.summarise(folder, counts, number)
    values: dict[str, float] = {}
    warnings: list[str] = []
    if {"fd", "fid"} & {*chosen}:
        pair = reference.gaussians["pooled"], gaussians["pooled"]
        values[network.frechet] = frechet_distance(*pair)
        warnings += [f"{network.frechet}: {warning}" for warning in [singular_warning(*pair)] if warning]
    if "sfid" in chosen and {*reference.gaussians, *gaussians} >= {"spatial"} and "spatial" in gaussians:
        values["sfid"] = frechet_distance(reference.gaussians["spatial"], gaussians["spatial"])
    if "is" in chosen and network.name == "inception":
        blocks = (block[f"{number}.probabilities"] for block in feature_files.read(folder, counts))
        values["is"], values["is deviation"] = inception_score(blocks, sum(counts))
    if reference.features is not None:
        real, fake = reference.features.to(network.device), fake.to(network.device)
        if "kid" in chosen:
            values["kid"], values["kid deviation"] = kid(real, fake)
        if {"precision", "recall"} & {*chosen}:
            values["precision"], values["recall"] = precision_recall(real, fake)
        if {"density", "coverage"} & {*chosen}:
            values["density"], values["coverage"] = density_coverage(real, fake)
    if {"p-ids", "u-ids"} & {*chosen}:
        pairs = (_all(folder, counts, f"{number}.{side}").to(network.device) for side in ("paired", "pooled"))
        values["p-ids"], values["u-ids"] = discrimination_scores(*pairs)
    return values, warnings


def of_pixels(folder: str, counts: tuple[int, ...], chosen: tuple[str, ...]) -> dict[str, float]:
    """The chosen metrics that need no feature network."""
    values: dict[str, float] = {}
    for name in ("psnr", "ssim", "lpips", "nfe", "seconds"):
        if name in chosen:
            values[name] = float(_all(folder, counts, name).double().mean())
    if {"miou", "pixel-accuracy"} & {*chosen}:
        confusion = Confusion(_all(folder, counts, "confusion").sum(0))
        values |= {"miou": confusion.mean_iou, "pixel-accuracy": confusion.pixel_accuracy}
    return values


def _all(folder: str, counts: tuple[int, ...], name: str) -> torch.Tensor:
    blocks: Iterator[feature_files.Block] = feature_files.read(folder, counts)
    return torch.cat([block[name] for block in blocks])
