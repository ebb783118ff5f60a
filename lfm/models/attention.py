"""Scaled dot-product attention, and the choice of the library that computes it.

    attend(q, k, v) = softmax(q k^T / sqrt(d)) v      over the tokens, for each head; d = head_dim

Vaswani et al. 2017, Eq. 1. On CUDA it is computed by the memory-efficient kernels of xformers, elsewhere and in compiled
blocks by torch's own scaled_dot_product_attention ("sdpa"). xformers is built against one version of CUDA and installs
beside any torch, so that it can be imported does not mean that it works. Before its first use a small call is made, and if
it fails, "auto" uses sdpa. Warnings of that call are ignored: with warnings as errors, they are no failures of xformers.
"""

from __future__ import annotations

import ctypes
import logging
import warnings
from functools import cache
from importlib import metadata
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lfm.errors import ConfigError
from lfm.models.config import AttentionBackend
from lfm.models.embeddings import rotate

logger = logging.getLogger(__name__)

VALUE_MIX = 0.5  # both learned factors of a value residual at the start


def attend(query: Tensor, key: Tensor, value: Tensor, backend: str = "auto") -> Tensor:
    """Compute the attention of query, key and value (B, tokens, heads, head_dim), in the same shape.

    Args:
        query: (B, tokens, heads, head_dim).
        key: (B, tokens, heads, head_dim).
        value: (B, tokens, heads, head_dim).
        backend: auto, xformers or sdpa.

    Raises:
        ConfigError: the backend is xformers, and it cannot be used on these tensors.
    """
    if _use_xformers(query, backend):
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(query, key, value)
    query = query.transpose(1, 2)  # (B, heads, tokens, head_dim)
    key, value = key.transpose(1, 2), value.transpose(1, 2)  # the same
    return scaled_dot_product_attention(query, key, value).transpose(1, 2)  # (B, tokens, heads, head_dim)


def _use_xformers(query: Tensor, backend: str) -> bool:
    assert backend in get_args(AttentionBackend), f"backend {backend!r}"
    # xformers breaks the graph of torch.compile, which costs more than its kernels gain.
    if backend == "sdpa" or (backend == "auto" and (torch.compiler.is_compiling() or not query.is_cuda)):
        return False
    problem = xformers_problem(query.dtype, query.shape[-1]) if query.is_cuda else "it runs on CUDA only"
    if problem and backend == "xformers":
        raise ConfigError(f"`attention` xformers: cannot be used: {problem}; set it to auto or sdpa")
    return not problem


@cache
def xformers_problem(dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why xformers fails on such tensors, or None if it works; tries it once, with gradients, and logs the result."""
    try:
        _preload_cuda_12_runtime()
        with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
            warnings.simplefilter("ignore")
            from xformers.ops import memory_efficient_attention

            probe = torch.zeros(1, 8, 1, head_dim, dtype=dtype, device="cuda", requires_grad=True)
            memory_efficient_attention(probe, probe, probe).sum().backward()
        torch.cuda.synchronize()
    except Exception as error:  # a library that does not match its torch may raise anything
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        logger.warning("attention: torch's sdpa for %s, head_dim %d; xformers fails: %s", dtype, head_dim, problem)
        return problem
    logger.info("attention: xformers for %s, head_dim %d", dtype, head_dim)
    return None


def _preload_cuda_12_runtime() -> None:
    """Load the CUDA 12 runtime that xformers links against, if its package is installed beside a newer torch."""
    try:
        files = metadata.files("nvidia-cuda-runtime-cu12") or []
    except metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name == "libcudart.so.12":
            ctypes.CDLL(str(file.locate()), mode=ctypes.RTLD_GLOBAL)


class SelfAttention(nn.Module):
    """Multi-head self-attention: (B, tokens, hidden_size) -> the same.

    With `qk_norm` queries and keys are divided by their root mean square over head_dim and scaled by learned weights.
    With weights of 1, no scaled product exceeds sqrt(head_dim) (Henry et al. 2020; Esser et al. 2024).

    With `value_residual` the values are m1 first_value + m2 value, with learned scalars m1 and m2 (Zhou et al. 2024).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        backend: str = "auto",
        qk_norm: bool = False,
        value_residual: bool = False,
    ) -> None:
        super().__init__()
        assert hidden_size % num_heads == 0, f"hidden_size {hidden_size}, num_heads {num_heads}"
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.projection = nn.Linear(hidden_size, hidden_size)
        head_dim = hidden_size // num_heads
        self.query_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.value_mix = nn.Parameter(torch.full((2,), VALUE_MIX)) if value_residual else None

    def forward(
        self,
        tokens: Tensor,
        rotation: Tensor | None = None,
        first_value: Tensor | None = None,
        return_value: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend among the tokens.

        Args:
            tokens: (B, tokens, hidden_size).
            rotation: their positions, the result of `embeddings.rotation_of`.
            first_value: values of the first block, (B, tokens, heads, head_dim), for `value_residual`.
            return_value: also return the values, (B, tokens, heads, head_dim).
        """
        query, key, value = (
            self.qkv(tokens)  # (B, tokens, 3 * hidden_size)
            .unflatten(-1, (3, self.num_heads, -1))  # (B, tokens, 3, heads, head_dim)
            .unbind(2)  # three of (B, tokens, heads, head_dim)
        )
        query, key = self.query_norm(query), self.key_norm(key)  # the same shapes
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)  # the same shapes
        if self.value_mix is not None:
            assert first_value is not None, "needed by `value_residual`"
            value = self.value_mix[0] * first_value + self.value_mix[1] * value  # (B, tokens, heads, head_dim)
        mixed = attend(query, key, value, self.backend)  # (B, tokens, heads, head_dim)
        result = self.projection(mixed.flatten(2))  # (B, tokens, hidden_size)
        return (result, value) if return_value else result
