"""Reference statistics: the features of a set of real images, with everything needed to reproduce them.

A safetensors file. The metadata entry `lfm` holds the header as JSON. The tensors are:

    pooled.mean (D,), pooled.covariance (D, D)        float64, of all images
    spatial.mean, spatial.covariance                  the same for sFID, if the network computes spatial features
    kept (K, D), kept_rows (K,)                       features of a random subset of the images, and their numbers
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from lfm import storage
from lfm.errors import DataError, on_one_line
from lfm.metrics.frechet import Gaussian

MAX_SUBSET = 10_000
_HEADER = "lfm"
# Statistics published as .npz: their name here -> names of mean and covariance, and dimensions of the features.
_PUBLISHED = {"pooled": ("mu", "sigma", 2048), "spatial": ("mu_s", "sigma_s", 2023)}


class ReferenceHeader(BaseModel):
    """Description of a reference; fields are None for imported statistics, whose files do not record them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    source: str
    data_digest: str | None = None
    image_size: int
    rule: str | None = None  # resize and crop rule of the images
    resized: bool = False  # whether the reference applied that rule, to files of any size
    stored: str | None = None  # formats of the image files
    count: int | None = None
    network: str  # as `features.load` takes it
    network_name: str
    network_hash: str | None = None
    network_description: str | None = None
    code_version: str


@dataclass(frozen=True)
class Reference:
    """Statistics of real images, and the features of a random subset of them."""

    header: ReferenceHeader
    gaussians: dict[str, Gaussian]  # `pooled` and, if the network computes it, `spatial`
    features: Tensor | None = None  # float32 (K, D), pooled features of the subset; None for imported statistics
    rows: Tensor | None = None  # int64 (K,), numbers of the subset's images


def subset_rows(count: int) -> np.ndarray:
    """Return the sorted numbers of a fixed random subset of `count` images, at most 10,000: int64 (K,)."""
    random = np.random.Generator(np.random.Philox(key=0))
    return np.sort(random.permutation(count)[:MAX_SUBSET])


def save(path: str, reference: Reference) -> None:
    """Write a reference atomically."""
    tensors: dict[str, Tensor] = {}
    for name, gaussian in reference.gaussians.items():
        tensors |= {f"{name}.mean": gaussian.mean, f"{name}.covariance": gaussian.covariance}
    if reference.features is not None and reference.rows is not None:
        tensors |= {"kept": reference.features, "kept_rows": reference.rows}
    with storage.writing(path) as temporary:
        contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, {_HEADER: reference.header.model_dump_json()})
        temporary.chmod(0o644)


def load(path: str) -> Reference:
    """Load a reference from a path or URL.

    Raises:
        DataError: If the file is not a reference.
    """
    content = storage.read_bytes(path)
    try:
        tensors = load_tensors(content)
        size = int.from_bytes(content[:8], "little")
        header = ReferenceHeader.model_validate_json(json.loads(content[8 : 8 + size])["__metadata__"][_HEADER])
        gaussians = {
            name: Gaussian(tensors[f"{name}.mean"], tensors[f"{name}.covariance"], header.count)
            for name in ("pooled", "spatial")
            if f"{name}.mean" in tensors or name == "pooled"
        }
    except (SafetensorError, ValidationError, ValueError, KeyError, TypeError) as error:
        reason = "its header is not that of a reference" if isinstance(error, ValidationError) else on_one_line(error)
        raise DataError(f"{path}: is not a reference ({reason}); make one with `lfm reference`") from error
    return Reference(header, gaussians, tensors.get("kept"), tensors.get("kept_rows"))


def import_npz(path: str, image_size: int, code_version: str) -> Reference:
    """Import statistics published by ADM (mu, sigma, mu_s, sigma_s), pytorch-fid or clean-fid (mu, sigma).

    Raises:
        DataError: If the file does not hold such statistics of the Inception network.
    """
    gaussians, content = {}, storage.read_bytes(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            for name, (mean_name, covariance_name, dimensions) in _PUBLISHED.items():
                if name != "pooled" and mean_name not in arrays:
                    continue
                mean = torch.from_numpy(arrays[mean_name].astype(np.float64))
                covariance = torch.from_numpy(arrays[covariance_name].astype(np.float64))
                if (mean.shape, covariance.shape) != ((dimensions,), (dimensions, dimensions)):
                    raise DataError(
                        f"{path}: {mean_name}, {covariance_name} do not have Inception's {dimensions} dimensions"
                    )
                gaussians[name] = Gaussian(mean, covariance, None)
    except (KeyError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path}: holds no statistics mu and sigma ({error}); download it again") from error
    header = ReferenceHeader(
        source=path,
        data_digest=hashlib.sha256(content).hexdigest(),
        image_size=image_size,
        network="inception",
        network_name="inception",
        code_version=code_version,
    )
    return Reference(header, gaussians)
