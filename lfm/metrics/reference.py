"""The reference: what a feature network says of the real images, with everything that makes it reproducible.

A safetensors file. Its header (`lfm`, JSON) says what it is of; its tensors, all of them features of the real set:

    pooled.mean (D,), pooled.covariance (D, D)        float64, of every image
    spatial.mean, spatial.covariance                  the same for sFID, where the network gives it
    kept (K, D), kept_rows (K,)                       features of K images drawn at random, and which they are
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
from lfm.errors import DataError
from lfm.metrics.frechet import Gaussian

MOST_KEPT = 10_000
_HEADER = "lfm"


class ReferenceHeader(BaseModel):
    """What a reference says of itself; None where it was imported from a file that does not tell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    source: str
    data_digest: str | None = None
    image_size: int
    rule: str | None = None
    resized: bool = False  # by that rule from files of any size, when the reference was made
    stored: str | None = None  # the formats of the files that the images came from
    count: int | None = None
    network: str  # as `features.load` takes it
    network_name: str
    network_hash: str | None = None
    network_description: str | None = None
    code_version: str


@dataclass(frozen=True)
class Reference:
    """Statistics of the real images."""

    header: ReferenceHeader
    gaussians: dict[str, Gaussian]  # pooled, and where there is one spatial
    kept: Tensor | None = None  # float32 (K, D)
    kept_rows: Tensor | None = None  # int64 (K,)


def kept_rows(count: int) -> np.ndarray:
    """Which images of a set are kept one by one: at most 10,000 at random, in order, int64 (K,)."""
    random = np.random.Generator(np.random.Philox(key=0))
    return np.sort(random.permutation(count)[:MOST_KEPT])


def save(path: str, reference: Reference) -> None:
    """Publish a reference in one step."""
    tensors: dict[str, Tensor] = {}
    for name, gaussian in reference.gaussians.items():
        tensors |= {f"{name}.mean": gaussian.mean, f"{name}.covariance": gaussian.covariance}
    if reference.kept is not None and reference.kept_rows is not None:
        tensors |= {"kept": reference.kept, "kept_rows": reference.kept_rows}
    with storage.writing(path) as temporary:
        contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, {_HEADER: reference.header.model_dump_json()})
        temporary.chmod(0o644)


def load(path: str) -> Reference:
    """A reference by path or URL.

    Raises:
        DataError: it is none.
    """
    content = storage.read_bytes(path)
    try:
        tensors = load_tensors(content)
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])["__metadata__"][_HEADER]
        known = ReferenceHeader.model_validate_json(header)
        gaussians = {
            name: Gaussian(tensors[f"{name}.mean"], tensors[f"{name}.covariance"], known.count)
            for name in ("pooled", "spatial")
            if f"{name}.mean" in tensors or name == "pooled"
        }
    except (SafetensorError, ValidationError, ValueError, KeyError, TypeError) as error:
        reason = (
            "its header is of something else" if isinstance(error, ValidationError) else " ".join(str(error).split())
        )
        raise DataError(f"{path}: is no reference ({reason[:200]}); make one with `lfm reference`") from error
    return Reference(known, gaussians, tensors.get("kept"), tensors.get("kept_rows"))


def import_npz(path: str, image_size: int, code_version: str) -> Reference:
    """The statistics that ADM (mu, sigma, mu_s, sigma_s), pytorch-fid or clean-fid (mu, sigma) publish.

    Raises:
        DataError: the file holds no such statistics, or not of the Inception network.
    """
    names = {"pooled": ("mu", "sigma", 2048), "spatial": ("mu_s", "sigma_s", 2023)}
    gaussians, content = {}, storage.read_bytes(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            for name, (mean, covariance, dimensions) in names.items():
                if name == "pooled" or mean in arrays:
                    m, s = (torch.from_numpy(arrays[key].astype(np.float64)) for key in (mean, covariance))
                    if (m.shape, s.shape) != ((dimensions,), (dimensions, dimensions)):
                        raise DataError(
                            f"{path}: {mean}, {covariance} are not of {dimensions} dimensions, as Inception's"
                        )
                    gaussians[name] = Gaussian(m, s, None)
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
