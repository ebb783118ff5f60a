"""Tests of the feature networks."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lfm.errors import ConfigError
from lfm.metrics import features
from lfm.metrics.features import FeatureNetwork, Features
from lfm.metrics.inception import MIXED, Inception, Mixed, resize


@pytest.fixture(scope="module")
def inception() -> Inception:
    torch.manual_seed(0)
    return Inception().eval()


@pytest.fixture(scope="module")
def inception_file(inception: Inception, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(inception.state_dict(), path)
    return path


def images(count: int = 2, size: int = 20) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_inception_has_the_published_shape(inception: Inception) -> None:
    """torchvision's Inception without its auxiliary head has 23,834,568 parameters and 1,000 classes, 8 fewer."""
    assert sum(parameter.numel() for parameter in inception.parameters()) == 23_834_568 + 8 * 2049
    names = set(inception.state_dict())
    assert {
        "Conv2d_1a_3x3.conv.weight",
        "Mixed_5b.branch5x5_2.bn.running_var",
        "Mixed_6a.branch3x3.conv.weight",
        "Mixed_6e.branch7x7dbl_5.conv.weight",
        "Mixed_7a.branch7x7x3_4.bn.weight",
        "Mixed_7c.branch3x3dbl_3b.conv.weight",
        "Mixed_7c.branch_pool.bn.bias",
        "fc.bias",
    } <= names
    assert len([name for name in names if name.endswith("conv.weight")]) == 94
    assert inception.get_submodule("Mixed_6b.branch7x7_2.conv").weight.shape == (128, 128, 1, 7)
    pools = [name for name in MIXED if inception.get_submodule(name).max_pool]
    assert pools == ["Mixed_7c"]


def test_average_pools_exclude_the_padding() -> None:
    block = Mixed(4, [{"branch_pool": (4, 1)}], max_pool=False).eval()
    nn.init.dirac_(block.get_submodule("branch_pool.conv").weight)
    ones = torch.ones(1, 4, 5, 5)
    torch.testing.assert_close(block(ones), ones / (1 + 0.001) ** 0.5)


def test_inception_returns_features_and_probabilities(inception: Inception) -> None:
    with torch.inference_mode():
        pooled, spatial, probabilities = inception(images())
    assert (pooled.shape, spatial.shape, probabilities.shape) == ((2, 2048), (2, 2023), (2, 1008))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2))


@pytest.mark.parametrize("size", [7, 32, 299, 300, 512])
def test_resize_samples_position_i_at_i_times_the_ratio(size: int) -> None:
    """On a ramp that rises by one per pixel, the value is the position itself, up to the last pixel."""
    ramp = torch.arange(size, dtype=torch.float32).expand(1, 1, size, size)
    positions = (torch.arange(299) * (size / 299)).clamp(max=size - 1)
    torch.testing.assert_close(resize(ramp)[0, 0], positions.expand(299, 299), rtol=1e-4, atol=1e-3)


def test_weights_must_match_and_only_the_published_ones_give_a_fid(inception_file: Path, tmp_path: Path) -> None:
    network = features.load(f"inception:{inception_file}")
    assert (network.name, network.frechet) == ("inception", "fd-inception")
    assert network.content_hash == features.file_hash(str(inception_file))
    state = torch.load(inception_file, weights_only=True)
    for change in ({"more": torch.zeros(1)}, {"fc.bias": torch.zeros(1000)}):
        torch.save(state | change, tmp_path / "other.pth")
        with pytest.raises(ConfigError, match=r"other\.pth: no weights of Inception"):
            features.load(f"inception:{tmp_path / 'other.pth'}")
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    for name in ("broken", "absent"):
        with pytest.raises(ConfigError, match=name):
            features.load(f"inception:{tmp_path / name}.pth")


def test_fd_lite_has_the_published_weights() -> None:
    network = features.load("fd-lite")
    assert network.content_hash.startswith("57934424"), "the hash in the published file name"
    noise = network(images(2, 64)).pooled
    assert noise.shape == (2, 1280)
    assert float(noise.std()) > 0.1
    assert not torch.equal(noise[0], noise[1])


class Colours(nn.Module):
    """The mean colour of an image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


def test_an_exported_module_is_a_feature_network(tmp_path: Path) -> None:
    path = tmp_path / "colours.pt2"
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    torch.export.save(torch.export.export(Colours(), (images(),), dynamic_shapes=(sizes,)), path)
    with pytest.raises(ConfigError, match="trust_code"):
        features.load(str(path))
    network = features.load(str(path), trust_code=True)
    assert (network.name, network.frechet) == ("colours", "fd-colours")
    expected = images(5, 8).numpy().mean((2, 3))
    np.testing.assert_allclose(network(images(5, 8)).pooled.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["inception", "inception:", "vgg", "absent.pt2"])
def test_unknown_networks_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        features.load(name)


def test_features_are_computed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a GPU, where torch's default are convolutions of TF32 inputs."""
    precisions: list[tuple[str, torch.device]] = []

    def record(precision: str, device: torch.device) -> nullcontext[None]:
        precisions.append((precision, device))
        return nullcontext()

    monkeypatch.setattr(features, "float32_arithmetic", record)
    device = torch.device("cpu")
    network = FeatureNetwork("mean", "mean", "0", "", device, lambda batch: Features(batch.float().mean((2, 3))))
    assert network(images()).pooled.shape == (2, 3)
    assert precisions == [("fp32", device)]
