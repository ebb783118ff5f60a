"""Scaled dot-product attention, and which library computes it.

    attend(q, k, v) = softmax(q k^T / sqrt(d)) v      over the tokens, for each head; d = head_dim

Vaswani et al. 2017, Eq. 1. On CUDA xformers' memory-efficient kernels compute it, elsewhere torch's own
scaled_dot_product_attention ("sdpa"). xformers is built against one CUDA and installs beside any torch, so that an
import proves nothing: before its first use a small call is made, and when that fails "auto" goes on with sdpa.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from importlib import metadata

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lfm.errors import ConfigError
from lfm.models.embeddings import rotate

BACKENDS = ("auto", "xformers", "sdpa")

logger = logging.getLogger(__name__)


def attend(query: Tensor, key: Tensor, value: Tensor, backend: str = "auto") -> Tensor:
    """Attention of (B, tokens, heads, head_dim) tensors, of the same shape.

    Raises ConfigError when `backend` is "xformers" and it cannot be used on these tensors.
    """
    if _use_xformers(query, backend):
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(query, key, value)
    query, key, value = (
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
    )  # (B, heads, tokens, head_dim)
    return scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _use_xformers(query: Tensor, backend: str) -> bool:
    assert backend in BACKENDS, f"backend {backend!r}"
    if backend == "sdpa" or (backend == "auto" and not query.is_cuda):
        return False
    problem = _xformers_problem(query.dtype, query.shape[-1]) if query.is_cuda else "it runs on CUDA only"
    if problem and backend == "xformers":
        raise ConfigError(f"attention xformers cannot be used: {problem}; set attention to auto or sdpa")
    return not problem


@cache
def _xformers_problem(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why xformers fails on such tensors, None when it works: tried once, forwards and backwards, and logged."""
    try:
        _preload_cuda_12_runtime()
        from xformers.ops import memory_efficient_attention

        with torch.inference_mode(False), torch.enable_grad():
            probe = torch.zeros(1, 8, 1, head_dim, dtype=dtype, device="cuda", requires_grad=True)
            memory_efficient_attention(probe, probe, probe).sum().backward()
        torch.cuda.synchronize()
    except Exception as error:  # whatever a library that does not fit its torch may raise
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        logger.warning("attention: torch's sdpa for %s, head_dim %d; xformers fails: %s", dtype, head_dim, problem)
        return problem
    logger.info("attention: xformers for %s, head_dim %d", dtype, head_dim)
    return None


def _preload_cuda_12_runtime() -> None:
    """Load the CUDA 12 runtime that xformers links against, where its package is installed beside a newer torch."""
    try:
        files = metadata.files("nvidia-cuda-runtime-cu12") or []
    except metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name == "libcudart.so.12":
            ctypes.CDLL(str(file.locate()), mode=ctypes.RTLD_GLOBAL)


class SelfAttention(nn.Module):
    """Multi-head self-attention: (B, tokens, hidden_size) -> the same. One linear makes q, k, v, then the heads.

    With `qk_norm` queries and keys are divided by their root mean square over head_dim and scaled by learned weights,
    so that no product of theirs exceeds sqrt(head_dim) at weights of 1 (Henry et al. 2020; Esser et al. 2024).
    """

    def __init__(self, hidden_size: int, num_heads: int, backend: str = "auto", qk_norm: bool = False) -> None:
        super().__init__()
        assert hidden_size % num_heads == 0, f"hidden_size {hidden_size}, num_heads {num_heads}"
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.projection = nn.Linear(hidden_size, hidden_size)
        head_dim = hidden_size // num_heads
        self.query_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, tokens: Tensor, rotation: Tensor | None = None) -> Tensor:
        """`rotation`, by the tokens' positions, is what `embeddings.rotation_of` gives."""
        query, key, value = (
            self.qkv(tokens)  # (B, tokens, 3 * hidden_size)
            .unflatten(-1, (3, self.num_heads, -1))  # (B, tokens, 3, heads, head_dim)
            .unbind(2)  # three of (B, tokens, heads, head_dim)
        )
        query, key = self.query_norm(query), self.key_norm(key)  # the same shapes
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        mixed = attend(query, key, value, self.backend)  # (B, tokens, heads, head_dim)
        return self.projection(mixed.flatten(2))  # (B, tokens, hidden_size)
