"""Rules by which the weights of one network become the first weights of another that differs from it.

    classes        each class begins at the mean of the rows of source classes that are named for it; a class without any
                   begins at the mean row of all classes (or at the null row). The null row is kept.
    no classes     the null row, or without one the mean row, is added to the time embedding, to which rows of classes are
                   added in the network. Where classes are new, their rows are 0: the first output is that of the source.
    channels       new input channels (conditions) have weights of 0: the first output is that of the source, bit for bit
    labels         rows by name, others at the mean row; a new embedding of segmentations begins at random, behind channels of 0
    patch size     the patch embedding by the pseudo-inverse of the bilinear resize (Beyer et al. 2023, FlexiViT), so that
                   larger patches give the tokens of the patches that they are the enlargement of; the output by the resize

Everything else must have the same name and shape. A backbone says in `VelocityNetwork.adapt` which rules are for which of its
weights, and in `ModelConfig.adaptable_fields` in which fields the two networks may differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lfm.errors import CheckpointError
from lfm.models.config import ModelConfig

Origin = Literal["taken as it is", "adapted", "new", "left out"]
NewClasses = Literal["mean", "null"]
Rows = tuple[tuple[int, ...], ...]
"""For each own row the numbers of the source's rows whose mean it begins at; none for a row that the source has not."""


@dataclass(frozen=True)
class Part:
    """What becomes of one weight or table."""

    name: str
    origin: Origin
    num_parameters: int
    rule: str = ""


@dataclass
class Adaptation:
    """The first weights of a network, as they are made from those of a source.

    Args:
        config: configuration of the network.
        source: configuration of the source.
        weights: weights of the source by name.
        initial: weights of the network as it was built, for new parts.
        class_rows: for each class of the network, rows of the source's classes; empty if either has no classes.
        label_rows: the same for the labels of segmentation maps.
        new_classes: where a class without rows begins.
    """

    config: ModelConfig
    source: ModelConfig
    weights: Mapping[str, Tensor]
    initial: Mapping[str, Tensor]
    class_rows: Rows = ()
    label_rows: Rows = ()
    new_classes: NewClasses = "mean"
    result: dict[str, Tensor] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)

    def current(self, name: str) -> Tensor:
        """Return a weight of the source, as the rules before have changed it."""
        return self.result[name] if name in self.result else self.weights[name]

    def put(self, name: str, value: Tensor, rule: str) -> None:
        """Set a weight of the network by a rule, after those of earlier rules, if any."""
        rules = [part.rule for part in self.parts if part.name == name] + [rule]
        self.parts = [part for part in self.parts if part.name != name]
        origin: Origin = "adapted"
        if name in self.weights and torch.equal(self.weights[name], value):
            origin, rules = "taken as it is", []
        self.result[name] = value.contiguous()
        self.parts.append(Part(name, origin, value.numel(), "; ".join(rules)))

    def begin(self, name: str, rule: str, value: Tensor | None = None) -> None:
        """Set a weight that the source has not: by default as the network was built."""
        value = self.initial[name] if value is None else value
        self.result[name] = value.clone()
        self.parts.append(Part(name, "new", value.numel(), rule))

    def leave_out(self, prefix: str, rule: str) -> None:
        """Leave out all weights of the source whose names begin with `prefix`."""
        count = sum(value.numel() for name, value in self.weights.items() if name.startswith(prefix))
        self.parts.append(Part(prefix.rstrip("."), "left out", count, rule))

    def note(self, name: str, rule: str) -> None:
        """Record the adaptation of something that has no weights."""
        self.parts.append(Part(name, "adapted", 0, rule))

    def take_the_rest(self) -> None:
        """Take all weights that no rule has set as they are.

        Raises:
            CheckpointError: the source has not got one, or one of another shape; names it.
        """
        for name, own in self.initial.items():
            if name in self.result:
                continue
            if name not in self.weights or self.weights[name].shape != own.shape:
                theirs = f"of shape {tuple(self.weights[name].shape)}" if name in self.weights else "missing"
                raise CheckpointError(f"its weight {name} is {theirs}, and of shape {tuple(own.shape)} here")
            self.result[name] = self.weights[name]
            self.parts.append(Part(name, "taken as it is", own.numel()))

    def table(self) -> str:
        """Return the parts as a table: those that are unchanged are summed by module, all others have a line each."""
        unchanged: dict[str, int] = {}
        for part in self.parts:
            if part.origin == "taken as it is":
                module = part.name.partition(".")[0]
                unchanged[module] = unchanged.get(module, 0) + part.num_parameters
        lines = [(name, "taken as it is", f"{count:,}", "") for name, count in unchanged.items()]
        lines += [
            (part.name, part.origin, f"{part.num_parameters:,}", part.rule)
            for part in self.parts
            if part.origin != "taken as it is"
        ]
        header = ("part", "origin", "parameters", "rule")
        widths = [max(len(line[column]) for line in [header, *lines]) for column in range(3)]
        return "\n".join(
            f"  {name:{widths[0]}}  {origin:{widths[1]}}  {count:>{widths[2]}}  {rule}".rstrip()
            for name, origin, count, rule in [header, *lines]
        )


def changed_field(own: ModelConfig, source: ModelConfig) -> tuple[str, object, object] | None:
    """Return the first field that no rule can adapt, with the value of the source and the own one; None if there is none."""
    theirs, ours = source.structure(), own.structure()
    for name in ours:
        if name in theirs and theirs[name] != ours[name]:
            return name, theirs[name], ours[name]
    return None


def mean_of_rows(table: Tensor, rows: Rows, otherwise: Tensor) -> Tensor:
    """Return for each own row the mean of the rows of `table` that are named for it, else `otherwise`."""
    return torch.stack([table[list(each)].mean(0) if each else otherwise for each in rows])


def adapt_class_table(adaptation: Adaptation, name: str, time_bias: str) -> None:
    """Set a class table (classes, width), whose last row may be that of the null class; rule `classes`."""
    own, source = adaptation.config, adaptation.source
    if source.num_classes is None and own.num_classes is None:
        return
    if source.num_classes is None:
        zeros = torch.zeros_like(adaptation.initial[name])
        return adaptation.begin(name, "0, so that the first output is that of the source", zeros)
    table = adaptation.weights[name]
    mean = table[: source.num_classes].mean(0)
    null = table[-1] if source.has_null_condition else mean
    kind = "null row" if source.has_null_condition else "mean row"
    if own.num_classes is None:
        adaptation.put(time_bias, adaptation.current(time_bias) + null, f"{kind} of the classes added")
        return adaptation.leave_out(name, f"its {kind} is in {time_bias}")
    rows = mean_of_rows(table, adaptation.class_rows, mean if adaptation.new_classes == "mean" else null)
    if own.has_null_condition:
        rows = torch.cat([rows, null[None]])
    rule = describe_rows(adaptation.class_rows, "classes", f"at the {adaptation.new_classes} row")
    adaptation.put(name, rows, f"{rule}; the null row begins at the {kind}" if own.has_null_condition else rule)


def adapt_class_projection(adaptation: Adaptation, name: str) -> None:
    """Set the projection (width, classes) of one-hot classes, whose null class is 0 and has no weights; rule `classes`."""
    own, source = adaptation.config, adaptation.source
    if source.num_classes is None and own.num_classes is None:
        return
    if source.num_classes is None:
        zeros = torch.zeros_like(adaptation.initial[name])
        return adaptation.begin(name, "0, so that the first output is that of the source", zeros)
    if own.num_classes is None:
        return adaptation.leave_out(name, "the null class is 0")
    table = adaptation.weights[name].T
    start = table.mean(0) if adaptation.new_classes == "mean" else torch.zeros_like(table[0])
    rule = describe_rows(adaptation.class_rows, "classes", f"at the {adaptation.new_classes} row")
    adaptation.put(name, mean_of_rows(table, adaptation.class_rows, start).T, rule)


def adapt_segmentation(adaptation: Adaptation, prefix: str) -> None:
    """Set the embedding of segmentations; rule `labels`."""
    own, source = adaptation.config, adaptation.source
    if own.num_labels is None:
        if source.num_labels is not None:
            adaptation.leave_out(f"{prefix}.", "there are no segmentations here")
        return
    names = [name for name in adaptation.initial if name.startswith(f"{prefix}.")]
    if source.num_labels is None:
        for name in names:
            adaptation.begin(name, "as in a new network")
        return
    if own.downsample_factor != source.downsample_factor:
        raise CheckpointError(f"its downsample_factor is {source.downsample_factor}, and {own.downsample_factor} here")
    name = f"{prefix}.table.weight"
    table = adaptation.weights[name]
    mean = table[: source.num_labels].mean(0)
    rows = mean_of_rows(table, adaptation.label_rows, mean)
    if own.has_null_condition:
        rows = torch.cat([rows, (table[-1] if source.has_null_condition else mean)[None]])
    adaptation.put(name, rows, describe_rows(adaptation.label_rows, "labels", "at the mean row"))


def adapt_input_channels(adaptation: Adaptation, name: str) -> None:
    """Set the first layer (width, channels, ...), whose channels are state, spatial condition and labels; rule `channels`.

    Raises:
        CheckpointError: both have a spatial condition, of different numbers of channels.
    """
    own, source = adaptation.config, adaptation.source
    if source.condition_channels and own.condition_channels not in (0, source.condition_channels):
        raise CheckpointError(
            f"its condition_channels is {source.condition_channels}, and {own.condition_channels} here"
        )
    old = adaptation.current(name)
    label_channels = [each.input_channels - each.latent_channels - each.condition_channels for each in (own, source)]
    groups = old.split([source.latent_channels, source.condition_channels, label_channels[1]], 1)
    sizes = (own.latent_channels, own.condition_channels, label_channels[0])
    values, rules = [groups[0]], []
    for title, group, size in zip(("spatial condition", "segmentation"), groups[1:], sizes[1:], strict=True):
        if size and not group.shape[1]:
            group = torch.zeros(old.shape[0], size, *old.shape[2:])
            rules.append(f"{size} new channels of the {title} are 0")
        elif group.shape[1] and not size:
            rules.append(f"{group.shape[1]} channels of the {title} left out")
            continue
        values.append(group)
    adaptation.put(name, torch.cat(values, 1), ", ".join(rules))


def describe_rows(rows: Sequence[Sequence[int]], noun: str, start: str) -> str:
    """Return in words how many rows are taken, averaged and new."""
    counts = {
        "taken": sum(len(each) == 1 for each in rows),
        "averaged from several": sum(len(each) > 1 for each in rows),
        f"new, {start}": sum(not each for each in rows),
    }
    return f"{len(rows)} {noun}: " + ", ".join(f"{count} {how}" for how, count in counts.items() if count)


def resize_of_patches(size: int, new_size: int) -> Tensor:
    """Return the bilinear resize of patches as a matrix, float64 (new_size^2, size^2)."""
    basis = torch.eye(size**2, dtype=torch.float64).view(size**2, 1, size, size)
    return interpolate(basis, size=(new_size, new_size), mode="bilinear", align_corners=False).flatten(1).T


def resize_patch_embedding(weight: Tensor, new_size: int) -> Tensor:
    """Return a patch embedding (width, channels, p, p) for patches of `new_size`; rule `patch size`.

    With B the resize and w' = pinv(B^T) w, the token of an enlarged patch, w' . B x, is that of the patch, w . x.
    """
    resize = resize_of_patches(weight.shape[-1], new_size)
    return (weight.double().flatten(2) @ torch.linalg.pinv(resize.T).T).unflatten(2, (new_size, new_size)).float()


def resize_patch_output(value: Tensor, size: int, new_size: int) -> Tensor:
    """Return weight or bias (p * p * C, ...) of the last layer for patches of `new_size`; rule `patch size`."""
    patches = value.double().unflatten(0, (size**2, -1))  # (p * p, C, ...)
    return torch.tensordot(resize_of_patches(size, new_size), patches, 1).flatten(0, 1).float()
