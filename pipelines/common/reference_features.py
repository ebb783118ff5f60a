"""A reference and the feature network that computed it, for evaluation and for the choice of the best weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lfm.errors import ConfigError
from lfm.metrics import features
from lfm.metrics import reference as references
from lfm.metrics.features import FD_LITE, INCEPTION, FeatureNetwork
from lfm.metrics.reference import Reference


@dataclass(frozen=True)
class ReferenceSet:
    """Statistics of real images, together with the feature network that they were computed with."""

    path: str
    reference: Reference
    network: FeatureNetwork

    @staticmethod
    def load(
        path: str, device: torch.device | str, networks: Sequence[str] = (), *, trust_code: bool = False
    ) -> ReferenceSet:
        """Load the reference at `path` and its feature network.

        Args:
            path: Path or URL of a reference.
            device: Device of the network.
            networks: Names of networks, as `lfm.metrics.features.load` takes them; among them that of the reference, unless
                it is fd-lite. The location that the reference recorded is not used, since a file must not make other files
                be loaded.
            trust_code: Whether code in a .pt2 file may be run.

        Raises:
            DataError: If `path` is not a reference.
            ConfigError: If the network is missing, or is not the one that computed the reference.
        """
        reference = references.load(path)
        header = reference.header
        names = [FD_LITE, *networks]
        name = next((name for name in names if features.short_name(name) == header.network_name), None)
        if name is None:
            example = f"{INCEPTION}:WEIGHTS.pth" if header.network_name == INCEPTION else f"{header.network_name}.pt2"
            raise ConfigError(
                f"{path}: was computed with the network {header.network_name}; set `network` to {example}, where you have it"
            )
        network = features.load(name, device, trust_code=trust_code)
        if header.network_hash not in (None, network.content_hash) or header.network_name != network.name:
            raise ConfigError(
                f"{path}: was computed with the network {header.network_name} ({str(header.network_hash)[:12]}), not "
                f"with {network.name} ({network.content_hash[:12]}); restore the former, or name its location with `network`"
            )
        return ReferenceSet(path, reference, network)

    def check_comparable(self, name: str, image_size: int, crop: str | None) -> None:
        """Check that images can be compared with this reference.

        Args:
            name: What the images are, for the message.
            image_size: Their height and width in pixels.
            crop: Their resize and crop rule; None where it is unknown.

        Raises:
            ConfigError: If the reference is of another image size or crop rule.
        """
        header = self.reference.header
        if image_size != header.image_size:
            raise ConfigError(
                f"{self.path}: its images have {header.image_size} pixels, those of {name} {image_size}; make a reference "
                f"of that size with `lfm reference {header.source} OUT --image-size {image_size}`"
            )
        if crop and header.rule and crop != header.rule:
            raise ConfigError(
                f"{self.path}: its images were cropped by the rule {header.rule}, those of {name} by {crop}; make a "
                "reference of that rule with `lfm reference`"
            )
