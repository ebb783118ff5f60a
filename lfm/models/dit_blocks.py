"""The blocks of the DiT and its final layer.

    x += g1 attention(n(x) (1 + a1) + b1);   x += g2 mlp(n(x) (1 + a2) + b2)

n is a normalization without weights: by mean and standard deviation (layer), or by the root mean square alone (rms, Zhang
& Sennrich 2019). mlp is W gelu(W x) (gelu), W max(W x, 0)^2 (relu2, So et al. 2021), or W (silu(W1 x) W2 x) of two thirds
the width (swiglu, Shazeer 2020). See `lfm.models.dit`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu, silu

from lfm.models.attention import SelfAttention
from lfm.models.dit_config import DiTConfig


class Block(nn.Module):
    """Attention, then an MLP, each modulated and gated by the signal: (B, tokens, hidden) -> the same.

    Args:
        config: of the DiT.
        takes_value: mix the values of the first block into those of this one (`config.value_residual`).
    """

    def __init__(self, config: DiTConfig, takes_value: bool = False) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.mlp_width
        gated = config.mlp == "swiglu"
        self.norm = _norm(config)
        self.attention = SelfAttention(width, config.num_heads, config.attention, config.qk_norm, takes_value)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * inner if gated else inner),
            _activation(config),
            nn.Linear(inner, width),
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self,
        tokens: Tensor,
        signal: Tensor,
        rotation: Tensor | None = None,
        first_value: Tensor | None = None,
        return_value: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the tokens, and with `return_value` also the values of the attention; see `SelfAttention`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(signal)[:, None].chunk(6, -1)  # (B, 1, hidden)
        inputs = _modulate(self.norm(tokens), shift1, scale1)  # (B, tokens, hidden)
        mixed = self.attention(inputs, rotation, first_value, return_value)  # (B, tokens, hidden)
        value = None
        if return_value:
            mixed, value = mixed
        tokens = tokens + gate1 * mixed  # (B, tokens, hidden)
        tokens = tokens + gate2 * self.mlp(_modulate(self.norm(tokens), shift2, scale2))  # (B, tokens, hidden)
        return tokens if value is None else (tokens, value)


def _activation(config: DiTConfig) -> nn.Module:
    if config.mlp == "swiglu":
        return SwiGLU()
    return SquaredReLU() if config.mlp == "relu2" else nn.GELU(approximate="tanh")


class SquaredReLU(nn.Module):
    """max(x, 0)^2, elementwise."""

    def forward(self, x: Tensor) -> Tensor:
        return relu(x).square()


class SwiGLU(nn.Module):
    """silu(gate) value, of the concatenated pair (gate, value): (..., 2 inner) -> (..., inner)."""

    def forward(self, pair: Tensor) -> Tensor:
        gate, value = pair.chunk(2, -1)  # two of (..., inner)
        return silu(gate) * value  # (..., inner)


class FinalLayer(nn.Module):
    """Modulation and projection of tokens (B, tokens, hidden) to patches of velocity (B, tokens, p * p * C)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm = _norm(config)
        self.linear = nn.Linear(width, config.patch_size**2 * config.latent_channels)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, tokens: Tensor, signal: Tensor) -> Tensor:
        shift, scale = self.modulation(signal)[:, None].chunk(2, -1)  # (B, 1, hidden)
        return self.linear(_modulate(self.norm(tokens), shift, scale))  # (B, tokens, p * p * C)


def _norm(config: DiTConfig) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.hidden_size, eps=1e-6, elementwise_affine=False)


def _modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return tokens * (1 + scale) + shift
