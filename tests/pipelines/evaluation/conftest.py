"""A fast feature network and a reference made with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import SmallSet
from tests.support.feature_networks import PooledPixels, export_network, make_small_reference


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported network with 12 features."""
    return export_network(PooledPixels(), tmp_path_factory.mktemp("network") / "small.pt2")


@pytest.fixture(scope="session")
def reference(small_set: SmallSet, network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference of the 40 scenes of the small set."""
    return make_small_reference(small_set, network, tmp_path_factory.mktemp("reference"))
