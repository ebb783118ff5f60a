"""Reference statistics: the features of a set of real images, with everything needed to reproduce them.

A safetensors file. The metadata entry `lfm` holds the header as JSON. The tensors are:

    pooled.mean (D,), pooled.covariance (D, D)        float64, of all images
    spatial.mean, spatial.covariance                  the same for sFID, if the network computes spatial features
    kept (K, D), kept_rows (K,)                       features of a random subset of the images, and their numbers
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from lfm import storage, tensor_file
from lfm.data.manifest import Pixels
from lfm.errors import DataError, on_one_line
from lfm.metrics.frechet import Gaussian

MAX_SUBSET = 10_000
# Statistics published as .npz: their name here -> names of mean and covariance, and dimensions of the features.
_PUBLISHED = {"pooled": ("mu", "sigma", 2048), "spatial": ("mu_s", "sigma_s", 2023)}


class ReferenceHeader(BaseModel):
    """Description of a reference; fields are None for imported statistics, whose files do not record them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: int = 1
    source: str
    data_digest: str | None = None
    image_size: Pixels
    rule: str | None = None  # resize and crop rule of the images
    resized: bool = False  # whether the reference applied that rule, to files of any size
    stored: str | None = None  # formats of the image files
    count: Annotated[int, Field(ge=1, le=10**12)] | None = None
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
    tensor_file.save(path, tensors, reference.header.model_dump(mode="json"))


def load(path: str) -> Reference:
    """Load a reference from a path or URL.

    Raises:
        DataError: If the file is not a reference.
    """
    try:
        tensors, content = tensor_file.load(path)
        header = ReferenceHeader.model_validate(content)
        gaussians = {
            name: Gaussian(tensors[f"{name}.mean"], tensors[f"{name}.covariance"], header.count)
            for name in ("pooled", "spatial")
            if f"{name}.mean" in tensors or name == "pooled"
        }
        reference = Reference(header, gaussians, tensors.get("kept"), tensors.get("kept_rows"))
        _check(reference)
    except (ValueError, KeyError, DataError) as error:
        reason = on_one_line(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"header: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        raise DataError(f"{path}: is not a reference ({reason}); make one with `lfm reference`") from error
    return reference


def is_damaged(path: str) -> bool:
    """Return whether a file cannot be read as tensors at all, or was changed after it was written."""
    try:
        tensor_file.load(path)
    except DataError:
        return True
    return False


def _check(reference: Reference) -> None:
    """Raise ValueError, naming the tensor, if shapes or values cannot be those of statistics."""
    for name, gaussian in reference.gaussians.items():
        size = len(gaussian.mean) if gaussian.mean.ndim == 1 else 0
        if not size or gaussian.covariance.shape != (size, size):
            raise ValueError(f"{name}.mean, {name}.covariance: shapes do not fit")
        for tensor in (gaussian.mean, gaussian.covariance):
            if tensor.dtype != torch.float64 or not tensor.isfinite().all():
                raise ValueError(f"{name}: is not of finite float64 numbers")
    if reference.features is None and reference.rows is None:
        return
    features, rows = reference.features, reference.rows
    if features is None or rows is None or features.ndim != 2 or rows.shape != features.shape[:1]:
        raise ValueError("kept, kept_rows: shapes do not fit")
    if features.shape[1] != len(reference.gaussians["pooled"].mean) or not features.is_floating_point():
        raise ValueError("kept: does not fit pooled.mean")
    if (
        not features.isfinite().all()
        or rows.dtype != torch.int64
        or not ((rows >= 0) & (rows < (reference.header.count or 0))).all()
    ):
        raise ValueError("kept, kept_rows: values out of range")


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
