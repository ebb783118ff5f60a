"""The rules of `lfm.models.adaptation` for the weights of a DiT."""

from __future__ import annotations

from lfm.models.adaptation import (
    Adaptation,
    adapt_class_table,
    adapt_input_channels,
    adapt_segmentation,
    resize_patch_embedding,
    resize_patch_output,
)
from lfm.models.dit_config import DiTConfig


def adapt_dit(adaptation: Adaptation) -> None:
    """Set the weights of a DiT whose configuration differs from that of its source."""
    _adapt_patch_size(adaptation)
    adapt_input_channels(adaptation, "patch_embedding.weight")
    adapt_class_table(adaptation, "class_embedding.table.weight", "time_embedding.mlp.2.bias")
    adapt_segmentation(adaptation, "segmentation_embedding")
    _adapt_position(adaptation)
    _adapt_heads(adaptation)


def _configs(adaptation: Adaptation) -> tuple[DiTConfig, DiTConfig]:
    own, source = adaptation.config, adaptation.source
    assert isinstance(own, DiTConfig) and isinstance(source, DiTConfig)
    return own, source


def _adapt_patch_size(adaptation: Adaptation) -> None:
    """Resize the patches of the first layer and of the last ones."""
    own, source = _configs(adaptation)
    if own.patch_size == source.patch_size:
        return
    sizes = f"patches of {source.patch_size} resized to {own.patch_size}"
    name = "patch_embedding.weight"
    weight = resize_patch_embedding(adaptation.weights[name], own.patch_size)
    adaptation.put(name, weight, f"{sizes} by the pseudo-inverse of the bilinear resize")
    for layer in ("final", "internal_final"):
        for kind in ("weight", "bias"):
            name = f"{layer}.linear.{kind}"
            if name in adaptation.weights and name in adaptation.initial:
                value = resize_patch_output(adaptation.weights[name], source.patch_size, own.patch_size)
                adaptation.put(name, value, f"{sizes}, bilinear")


def _adapt_position(adaptation: Adaptation) -> None:
    """Say how positions of another grid are computed: the formula of the module, whose grid is extended."""
    own, source = _configs(adaptation)
    side, source_side = own.latent_size // own.patch_size, source.latent_size // source.patch_size
    if side != source_side:
        grid = f"computed for {side} x {side} tokens in place of {source_side} x {source_side}"
        adaptation.note("position", f"{own.position} {grid}")


def _adapt_heads(adaptation: Adaptation) -> None:
    """Begin heads after the early blocks that the source has not, or leave them out."""
    for prefix, key in (("internal_final.", "internal_head"), ("latent_head.", "latent_head")):
        names = [name for name in adaptation.initial if name.startswith(prefix)]
        if not getattr(adaptation.source, key):
            for name in names:
                adaptation.begin(name, "as in a new network")
        elif not names:
            adaptation.leave_out(prefix, f"model.{key} is off here")
