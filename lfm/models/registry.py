"""The table of backbones. To add one, write the module of its network and that of its configuration, and add a line to
`BACKBONES`. This module imports no torch until a network is built.
"""

from __future__ import annotations

import pkgutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lfm.errors import CheckpointError, ConfigError
from lfm.models.config import BackboneOptions, ModelConfig
from lfm.models.dit_config import DiTConfig, DiTOptions
from lfm.models.unet_config import UNetConfig, UNetOptions

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.models.adaptation import Adaptation, NewClasses, Rows
    from lfm.models.network import VelocityNetwork

DEFAULT_BACKBONE = "dit"  # of experiments and weights files that name none


@dataclass(frozen=True)
class Backbone:
    """A network architecture."""

    config: type[ModelConfig]
    options: type[BackboneOptions]
    """The keys of the `model:` section of an experiment."""
    network: str
    """The class of the network as "module:name", a subclass of `VelocityNetwork`; imported when it is built."""


BACKBONES = {
    "dit": Backbone(DiTConfig, DiTOptions, "lfm.models.dit:DiT"),
    "unet": Backbone(UNetConfig, UNetOptions, "lfm.models.unet:UNet"),
}


def backbone_name(config: ModelConfig) -> str:
    """Return the name of the backbone that a configuration is for."""
    return next(name for name, backbone in BACKBONES.items() if type(config) is backbone.config)


def build_network(config: ModelConfig) -> VelocityNetwork:
    """Build the network of a configuration with initial weights, in training mode."""
    network: VelocityNetwork = pkgutil.resolve_name(BACKBONES[backbone_name(config)].network)(config)
    return network


def adapt_weights(
    network: VelocityNetwork,
    weights: dict[str, Tensor],
    source: ModelConfig,
    *,
    class_rows: Rows = (),
    label_rows: Rows = (),
    new_classes: NewClasses = "mean",
) -> Adaptation:
    """Return first weights of a network from those of a source of another configuration, and by which rules.

    Raises:
        CheckpointError: there is no rule for a difference; names its key on both sides.
    """
    from lfm.models.adaptation import Adaptation, changed_field

    own = network.config
    if type(own) is not type(source):
        raise CheckpointError(f"its backbone is {backbone_name(source)}, and {backbone_name(own)} here")
    if changed := changed_field(own, source):
        raise CheckpointError("its {} is {}, and {} here".format(*changed))
    initial = network.state_dict()
    adaptation = Adaptation(own, source, weights, initial, class_rows, label_rows, new_classes)
    network.adapt(adaptation)
    adaptation.take_the_rest()
    return adaptation


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Return a configuration as JSON content, with the name of its backbone."""
    return {"backbone": backbone_name(config), **asdict(config)}


def config_from_json(content: dict[str, Any]) -> ModelConfig:
    """Return the configuration of `config_to_json`; content without a backbone is of the DiT.

    Raises:
        ConfigError: the backbone is unknown, or a field is out of range.
        TypeError: a field is missing or unknown.
    """
    fields = dict(content)
    name = fields.pop("backbone", DEFAULT_BACKBONE)
    if name not in BACKBONES:
        raise ConfigError(f"backbone {name}: unknown; one of {', '.join(BACKBONES)}")
    return BACKBONES[name].config(**fields)
