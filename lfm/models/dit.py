"""The diffusion transformer (DiT) of Peebles & Xie 2022, as the velocity network of Dao et al. 2023.

    tokens    = patches(state, spatial condition, embedded segmentation) W + position
    signal    = time embedding + class embedding
    block     x += g1 attention(n(x) (1 + a1) + b1);   x += g2 mlp(n(x) (1 + a2) + b2)
    velocity  = unpatchify((n(x) (1 + a) + b) W)

n, layer normalisation without weights; (b1, a1, g1, b2, a2, g2) = W silu(signal), the shift, scale and gate of each
branch, zero at the start, so that every block begins as the identity (adaLN-Zero, figure 3 of the paper) and the
network's first velocity is 0. mlp, two linears round a tanh-approximated GELU.

Beyond the paper, each by its key: rotary positions, normalised queries and keys, RMSNorm, SwiGLU, and token dropping: in
training some tokens bypass the middle blocks (TREAD, Krause et al. 2025), which so cost less, while every token still has
a velocity and a loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lfm.errors import ConfigError
from lfm.models.attention import BACKENDS
from lfm.models.dit_blocks import Block, FinalLayer
from lfm.models.embeddings import (
    LABEL_CHANNELS,
    ClassEmbedding,
    SegmentationEmbedding,
    TimeEmbedding,
    grid_coordinates,
    rotation_of,
    sincos_position_embedding,
)
from lfm.types import Condition

# hidden_size, depth, num_heads; S to XL as published, Ti and XS for a CPU
DIT_SIZES = {
    "Ti": (192, 6, 3),
    "XS": (256, 8, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
CHOICES = {"attention": BACKENDS, "position": ("sincos", "rope"), "norm": ("layer", "rms"), "mlp": ("gelu", "swiglu")}


@dataclass(frozen=True)
class DiTConfig:
    """All that shapes a DiT. Raises ConfigError, naming the keys, where they do not fit together."""

    latent_channels: int
    latent_size: int
    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    num_classes: int | None = None  # None: the model takes no class
    condition_dropout: float = 0.0  # above 0: the model has a null condition, and can be guided
    condition_channels: int = 0  # of Condition.spatial, concatenated to the state
    num_labels: int | None = None  # None: the model takes no segmentation
    downsample_factor: int = 8  # pixels of a segmentation for each of the latent, along a side
    time_scale: float = 1000.0  # 1 for the paper's own checkpoints
    frequency_shift: int = 0  # of the time's frequencies; 1 as in diffusers' DiT
    attention: str = "auto"  # auto | xformers | sdpa
    position: str = "sincos"  # sincos, added to the tokens | rope, turns queries and keys
    norm: str = "layer"  # layer | rms
    mlp: str = "gelu"  # gelu | swiglu, of as many parameters
    qk_norm: bool = False
    token_dropout: float = 0.0  # share of the tokens that bypass the middle blocks in training
    activation_checkpointing: int = 0  # every n-th block; 0 none, 1 all

    def __post_init__(self) -> None:
        counts = ("latent_channels", "latent_size", "patch_size", "hidden_size", "depth", "num_heads", "num_classes")
        for name in (*counts, "num_labels", "downsample_factor"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: must be at least 1")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise ConfigError(f"hidden_size {self.hidden_size} must be a multiple of 4, for the position embedding")
        if self.latent_size % self.patch_size:
            raise ConfigError(f"latent_size {self.latent_size} must be a multiple of patch_size {self.patch_size}")
        if not 0 <= self.condition_dropout < 1:
            raise ConfigError(f"condition_dropout {self.condition_dropout}: must be at least 0 and below 1")
        if self.condition_dropout and not self.is_conditional:
            raise ConfigError(
                f"condition_dropout {self.condition_dropout} needs a condition, such as num_classes: set it, or "
                "condition_dropout to 0"
            )
        if self.position == "rope" and self.head_dim % 4:
            raise ConfigError(f"position rope: hidden_size {self.hidden_size} / num_heads must be a multiple of 4")
        if not 0 <= self.token_dropout < 1:
            raise ConfigError(f"token_dropout {self.token_dropout}: must be at least 0 and below 1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} {getattr(self, name)!r}: must be one of {', '.join(choices)}")

    @property
    def num_tokens(self) -> int:
        return (self.latent_size // self.patch_size) ** 2

    @property
    def is_conditional(self) -> bool:
        return self.num_classes is not None or self.condition_channels > 0 or self.num_labels is not None

    @property
    def input_channels(self) -> int:
        """Of the state and all that is concatenated to it."""
        return self.latent_channels + self.condition_channels + (LABEL_CHANNELS if self.num_labels else 0)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_kept_tokens(self) -> int:
        """Tokens that the middle blocks see in training."""
        return max(1, round(self.num_tokens * (1 - self.token_dropout)))

    @property
    def middle_blocks(self) -> range:
        """The blocks that dropped tokens bypass: all but two at each end, or a quarter each of fewer than eight."""
        margin = min(2, self.depth // 4)
        return range(margin, self.depth - margin)

    @property
    def mlp_width(self) -> int:
        """Of the hidden layer; SwiGLU has three matrices, so two thirds of it, rounded up to a multiple of 8."""
        inner = int(self.hidden_size * self.mlp_ratio)
        return inner if self.mlp == "gelu" else -(-2 * inner // 24) * 8


class DiT(nn.Module):
    """The velocity network: state, time and condition -> velocity."""

    position: Tensor  # fixed: float32 (tokens, hidden_size), or for rope int64 (tokens, 2)

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch, side = config.hidden_size, config.patch_size, config.latent_size // config.patch_size
        self.patch_embedding = nn.Conv2d(config.input_channels, width, kernel_size=patch, stride=patch)
        self.time_embedding = TimeEmbedding(width, scale=config.time_scale, shift=config.frequency_shift)
        self.class_embedding = (
            None
            if config.num_classes is None
            else ClassEmbedding(config.num_classes, width, with_null=config.condition_dropout > 0)
        )
        self.segmentation_embedding = (
            None
            if config.num_labels is None
            else SegmentationEmbedding(
                config.num_labels, config.downsample_factor, with_null=config.condition_dropout > 0
            )
        )
        rope = config.position == "rope"
        position = grid_coordinates(side, side) if rope else sincos_position_embedding(width, side, side)
        self.register_buffer("position", position, persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final = FinalLayer(config)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Zero what scales a branch or the output, normal embeddings, the rest Xavier-uniform (Peebles & Xie 2022).

        The weights of the norms begin at 1.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "modulation" in name or name.startswith("final"):
                nn.init.zeros_(parameter)
            elif name.startswith(("time_embedding", "class_embedding")):
                nn.init.normal_(parameter, std=0.02)
            elif name == "segmentation_embedding.table.weight":
                nn.init.normal_(parameter)  # as large as the latents beside which it is concatenated
            elif "_norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.xavier_uniform_(parameter.detach().flatten(1))  # the patch convolution as the linear that it is

    def forward(self, state: Tensor, time: Tensor, condition: Condition, kept: Tensor | None = None) -> Tensor:
        """Velocity, float32 (B, C, h, w), at state (B, C, h, w) and time (B,).

        `kept`, int64 (B, num_kept_tokens): which tokens the middle blocks see; None, as in sampling: all of them.

        Raises ConfigError for a condition that the model does not take, or that it takes and is missing.
        """
        self._check(state, condition)
        inputs = torch.cat([state, *self._maps(condition)], 1)  # (B, input channels, h, w)
        patches = self.patch_embedding(inputs.to(self.patch_embedding.weight.dtype))  # (B, hidden, h/p, w/p)
        tokens = patches.flatten(2).transpose(1, 2)  # (B, tokens, hidden)
        rotation = None
        if self.config.position == "rope":
            rotation = rotation_of(self.position, self.config.head_dim)  # (2, tokens, 1, head_dim / 2)
        else:
            tokens = tokens + self.position.to(tokens.dtype)  # (B, tokens, hidden)
        signal = self.time_embedding(time)  # (B, hidden)
        if self.class_embedding is not None:
            signal = signal + self.class_embedding(condition.class_index)  # (B, hidden)
        tokens = self._through(tokens, signal, rotation, kept)  # (B, tokens, hidden)
        return self._unpatchify(self.final(tokens, signal)).float()  # (B, C, h, w)

    def compile_blocks(self) -> None:
        """Let torch.compile each block when it is first called: they are alike, so that one graph serves them all."""
        for block in self.blocks:
            block.compile()

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def _maps(self, condition: Condition) -> Iterator[Tensor]:
        """What lies over the latent, each (B, ..., h, w)."""
        if condition.spatial is not None:
            yield condition.spatial
        if self.segmentation_embedding is not None:
            yield self.segmentation_embedding(condition.segmentation)

    def _through(self, tokens: Tensor, signal: Tensor, rotation: Tensor | None, kept: Tensor | None) -> Tensor:
        """All blocks; tokens that are not `kept` come back from the middle ones as they were."""
        middle = self.config.middle_blocks
        tokens = self._run(range(middle.start), tokens, signal, rotation)
        if kept is None:
            tokens = self._run(middle, tokens, signal, rotation)
        else:
            places = kept[..., None].expand(-1, -1, tokens.shape[-1])  # (B, kept, hidden)
            turn = None if rotation is None else rotation[:, kept]  # (2, B, kept, 1, head_dim / 2)
            tokens = tokens.scatter(1, places, self._run(middle, tokens.gather(1, places), signal, turn))
        return self._run(range(middle.stop, self.config.depth), tokens, signal, rotation)

    def _run(self, blocks: range, tokens: Tensor, signal: Tensor, rotation: Tensor | None) -> Tensor:
        every = self.config.activation_checkpointing
        for index in blocks:
            inputs = (tokens, signal, rotation)
            if every and index % every == 0 and torch.is_grad_enabled():
                tokens = checkpoint(self.blocks[index], *inputs, use_reentrant=False)
            else:
                tokens = self.blocks[index](*inputs)
        return tokens

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, tokens, p * p * C) -> (B, C, h, w)."""
        config = self.config
        side, patch = config.latent_size // config.patch_size, config.patch_size
        grid = patches.unflatten(2, (patch, patch, config.latent_channels)).unflatten(1, (side, side))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _check(self, state: Tensor, condition: Condition) -> None:
        config = self.config
        expected = (config.latent_channels, config.latent_size, config.latent_size)
        assert state.shape[1:] == expected, f"state {tuple(state.shape[1:])}, the model takes {expected}"
        if condition.class_index is None and config.num_classes is not None:
            raise ConfigError(f"the model was trained with {config.num_classes} classes: give a class index")
        if condition.class_index is not None and config.num_classes is None:
            raise ConfigError("the model was trained without classes: give no class index")
        channels = 0 if condition.spatial is None else condition.spatial.shape[1]
        if channels != config.condition_channels:
            takes = config.condition_channels
            raise ConfigError(
                f"the model takes {takes} channels of spatial condition (condition_channels), not {channels}"
            )
        given = 0 if condition.segmentation is None else condition.segmentation.shape[-1]
        taken = 0 if config.num_labels is None else config.latent_size * config.downsample_factor
        if given != taken:
            raise ConfigError(f"the model takes segmentations of {taken} pixels (0: takes none), not {given}")


def flops_per_sample(config: DiTConfig) -> int:
    """Floating-point operations of one forward pass for one latent: matrix products only, two per multiply-add.

    In training: dropped tokens are left out where the middle blocks do not see them.
    """
    width, tokens, patch_area = config.hidden_size, config.num_tokens, config.patch_size**2
    mlp = (3 if config.mlp == "swiglu" else 2) * width * config.mlp_width

    def block(tokens: int) -> int:
        return tokens * (4 * width**2 + 2 * tokens * width + mlp) + 6 * width**2

    middle = len(config.middle_blocks)
    blocks = (config.depth - middle) * block(tokens) + middle * block(config.num_kept_tokens)
    patching = tokens * width * patch_area * config.input_channels
    if config.num_labels:
        patching += (config.latent_size * config.downsample_factor * LABEL_CHANNELS) ** 2
    time = 256 * width + width**2
    final = tokens * width * patch_area * config.latent_channels + 2 * width**2
    return 2 * (patching + time + blocks + final)
