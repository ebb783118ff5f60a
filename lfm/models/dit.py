"""The diffusion transformer (DiT) of Peebles & Xie 2022, as the velocity network of Dao et al. 2023.

    tokens    = patches(state, spatial condition, embedded segmentation) W + position
    signal    = time embedding + class embedding
    block     x += g1 attention(n(x) (1 + a1) + b1);   x += g2 mlp(n(x) (1 + a2) + b2)
    velocity  = unpatchify((n(x) (1 + a) + b) W)

n is a layer normalization without weights. (b1, a1, g1, b2, a2, g2) = W silu(signal) are the shift, scale and gate of the
two branches. W is zero at the start, so every block begins as the identity (adaLN-Zero, figure 3 of the paper) and the
network's first velocity is 0. mlp is two linear layers with a tanh-approximated GELU between them.

Options beyond the paper: rotary positions, normalized queries and keys, RMSNorm, SwiGLU, squared ReLU, values of the attention
mixed with those of the first block (value residual, Zhou et al. 2024), and token dropout: in training some tokens bypass the
middle blocks (TREAD, Krause et al. 2025), which makes these blocks cheaper, while every token still has a velocity and a loss.
With `internal_head` the tokens after a third of the blocks have a final layer of their own, whose velocity is trained, too, and
from which internal guidance extrapolates (arXiv 2512.24176). With `latent_head` a small head predicts the clean latent from the
same tokens, in training only (arXiv 2601.17830).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lfm.models.adaptation import Adaptation
from lfm.models.attention import VALUE_MIX
from lfm.models.dit_adaptation import adapt_dit
from lfm.models.dit_blocks import Block, FinalLayer
from lfm.models.dit_config import FREQUENCY_SIZE, DiTConfig
from lfm.models.embeddings import (
    ClassEmbedding,
    SegmentationEmbedding,
    TimeEmbedding,
    grid_coordinates,
    rotation_of,
    sincos_position_embedding,
)
from lfm.models.network import VelocityNetwork
from lfm.types import Condition


class DiT(VelocityNetwork):
    """Diffusion transformer; see the module and `VelocityNetwork`."""

    config: DiTConfig
    input_layer = "patch_embedding"
    position: Tensor  # fixed: float32 (tokens, hidden_size), or for rope int64 (tokens, 2)

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch, side = config.hidden_size, config.patch_size, config.latent_size // config.patch_size
        with_null = config.has_null_condition
        self.patch_embedding = nn.Conv2d(config.input_channels, width, kernel_size=patch, stride=patch)
        self.time_embedding = TimeEmbedding(width, FREQUENCY_SIZE, config.time_scale, config.frequency_shift)
        self.class_embedding = None
        if config.num_classes is not None:
            self.class_embedding = ClassEmbedding(config.num_classes, width, with_null)
        self.segmentation_embedding = None
        if config.num_labels is not None:
            self.segmentation_embedding = SegmentationEmbedding(config.num_labels, config.downsample_factor, with_null)
        rope = config.position == "rope"
        position = grid_coordinates(side, side) if rope else sincos_position_embedding(width, side, side)
        self.register_buffer("position", position, persistent=False)
        self.blocks = nn.ModuleList(
            Block(config, takes_value=config.value_residual and index > 0) for index in range(config.depth)
        )
        self.final = FinalLayer(config)
        self.internal_final = FinalLayer(config) if config.internal_head else None
        self.latent_head = None
        if config.latent_head:
            self.latent_head = nn.Sequential(
                nn.Linear(width, width), nn.SiLU(), nn.Linear(width, patch**2 * config.latent_channels)
            )
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initialize as Peebles & Xie 2022: modulations, biases and output zero, embeddings normal, the rest Xavier-uniform.

        The weights of the norms of queries and keys are 1.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "modulation" in name or name.startswith(("final", "internal_final")):
                nn.init.zeros_(parameter)
            elif name.startswith(("time_embedding", "class_embedding")):
                nn.init.normal_(parameter, std=0.02)
            elif name == "segmentation_embedding.table.weight":
                nn.init.normal_(parameter)  # on the scale of the latents to which it is concatenated
            elif name.endswith("value_mix"):
                nn.init.constant_(parameter, VALUE_MIX)
            elif "_norm" in name:
                nn.init.ones_(parameter)
            else:
                # Flat, because the patch convolution is a linear layer over patches.
                nn.init.xavier_uniform_(parameter.detach().flatten(1))

    def forward(
        self,
        state: Tensor,
        time: Tensor,
        condition: Condition,
        kept_tokens: Tensor | None = None,
        return_tokens: tuple[int, ...] = (),
        internal: bool = False,
        latent: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """See `VelocityNetwork.forward`."""
        assert all(0 <= index < self.config.depth for index in return_tokens), f"return_tokens {return_tokens}"
        self.check_inputs(state, condition)
        patches = self._embed_patches(state, condition)  # (B, hidden, h/p, w/p)
        tokens = patches.flatten(2).transpose(1, 2)  # (B, tokens, hidden)
        rotation = None
        if self.config.position == "rope":
            rotation = rotation_of(self.position, self.config.head_dim)  # (2, tokens, 1, head_dim / 2)
        else:
            tokens = tokens + self.position.to(tokens.dtype)  # (B, tokens, hidden)
        signal = self.time_embedding(time)  # (B, hidden)
        if self.class_embedding is not None:
            signal = signal + self.class_embedding(condition.class_index)  # (B, hidden)
        inner = (self.config.internal_block,) if internal or latent else ()
        outputs = dict.fromkeys(
            (*return_tokens, *inner), tokens
        )  # replaced as the blocks run, each (B, tokens, hidden)
        tokens = self._run_all_blocks(tokens, signal, rotation, kept_tokens, outputs)  # (B, tokens, hidden)
        velocity = self._unpatchify(self.final(tokens, signal)).float()  # (B, C, h, w)
        heads = []
        if internal:
            assert self.internal_final is not None, "checked by the caller: config.has_internal_velocity"
            heads.append(self.internal_final(outputs[self.config.internal_block], signal))  # (B, tokens, p * p * C)
        if latent:
            assert self.latent_head is not None, "checked by the caller: config.has_latent_head"
            heads.append(self.latent_head(outputs[self.config.internal_block]))  # (B, tokens, p * p * C)
        if heads:
            velocity = torch.stack([velocity, *(self._unpatchify(head).float() for head in heads)])
        return (velocity, tuple(outputs[index] for index in return_tokens)) if return_tokens else velocity

    def compile_blocks(self, **options: Any) -> None:
        for block in self.blocks:
            block.compile(**options)  # the blocks are equal, so that one compiled graph serves all of them

    def hidden_matrices(self) -> dict[str, int]:
        stacked = {"attention.qkv": 3, "mlp.0": 2 if self.config.mlp == "swiglu" else 1}
        layers = ("attention.qkv", "attention.projection", "mlp.0", "mlp.2")
        return {
            f"blocks.{index}.{layer}.weight": stacked.get(layer, 1)
            for index in range(self.config.depth)
            for layer in layers
        }

    @staticmethod
    def adapt(adaptation: Adaptation) -> None:
        """See `VelocityNetwork.adapt`; the rules are those of `lfm.models.dit_adaptation`."""
        adapt_dit(adaptation)

    def scale_for_width(self, reference_width: int) -> dict[str, float]:
        """See `VelocityNetwork.scale_for_width`."""
        # Of Yang & Hu 2022, table 8: matrices whose inputs are features have a learning rate of 1 / width, and weights of
        # variance 1 / width, as Xavier's; weights of inputs of a fixed size have neither. The output begins at 0.
        width = self.config.hidden_size
        inputs = self.patch_embedding.weight[0].numel()
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            parameters["patch_embedding.weight"].mul_(((inputs + width) / (inputs + reference_width)) ** 0.5)
            parameters["time_embedding.mlp.2.weight"].mul_((reference_width / width) ** 0.5)
        layers = {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        return {
            f"{name}.weight": reference_width / width
            for name, module in layers.items()
            if name != "time_embedding.mlp.0"
        }

    def _embed_patches(self, state: Tensor, condition: Condition) -> Tensor:
        """Embed the patches of the state and of the conditions that lie over it: (B, hidden, h/p, w/p)."""
        inputs = [state]
        if condition.spatial is not None:
            inputs.append(condition.spatial)  # (B, K, h, w)
        if self.segmentation_embedding is not None:
            inputs.append(self.segmentation_embedding(condition.segmentation))  # (B, label channels, h, w)
        return self.patch_embedding(torch.cat(inputs, 1).to(self.patch_embedding.weight.dtype))

    def _run_all_blocks(
        self,
        tokens: Tensor,
        signal: Tensor,
        rotation: Tensor | None,
        kept_tokens: Tensor | None,
        outputs: dict[int, Tensor],
    ) -> Tensor:
        """Run all blocks, the middle ones on the kept tokens only; the others bypass them unchanged."""
        middle = self.config.middle_blocks
        tokens, value = self._run_blocks(range(middle.start), tokens, signal, rotation, outputs)
        if kept_tokens is None:
            tokens, value = self._run_blocks(middle, tokens, signal, rotation, outputs, value)
        else:
            places = kept_tokens[..., None].expand(-1, -1, tokens.shape[-1])  # (B, kept, hidden)
            kept_rotation = None if rotation is None else rotation[:, kept_tokens]  # (2, B, kept, 1, head_dim / 2)
            inputs = tokens.gather(1, places)  # (B, kept, hidden)
            kept_value = None
            if value is not None:
                kept_value = value.gather(1, kept_tokens[..., None, None].expand(-1, -1, *value.shape[2:]))
            processed, _ = self._run_blocks(
                middle, inputs, signal, kept_rotation, outputs, kept_value
            )  # (B, kept, hidden)
            for index in middle:
                if index in outputs:
                    outputs[index] = tokens.scatter(1, places, outputs[index])  # (B, tokens, hidden)
            tokens = tokens.scatter(1, places, processed)  # (B, tokens, hidden)
        last = range(middle.stop, self.config.depth)
        return self._run_blocks(last, tokens, signal, rotation, outputs, value)[0]

    def _run_blocks(
        self,
        blocks: range,
        tokens: Tensor,
        signal: Tensor,
        rotation: Tensor | None,
        outputs: dict[int, Tensor],
        value: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run some blocks, and store their outputs under the numbers that are keys of `outputs`.

        Returns:
            The tokens; and the values of the first block, (B, tokens, heads, head_dim), that later ones need: those of
            `value`, or of block 0 if it is among `blocks`.
        """
        every = self.config.activation_checkpointing
        for index in blocks:
            is_first = self.config.value_residual and index == 0
            inputs = (tokens, signal, rotation, value, is_first)
            if every and index % every == 0 and torch.is_grad_enabled():
                result = checkpoint(self.blocks[index], *inputs, use_reentrant=False)
            else:
                result = self.blocks[index](*inputs)
            tokens, value = result if is_first else (result, value)
            if index in outputs:
                outputs[index] = tokens
        return tokens, value

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """Return patches (B, tokens, p * p * C) as a latent (B, C, h, w)."""
        config = self.config
        side, patch = config.latent_size // config.patch_size, config.patch_size
        grid = patches.unflatten(2, (patch, patch, config.latent_channels))  # (B, tokens, p, p, C)
        grid = grid.unflatten(1, (side, side))  # (B, h/p, w/p, p, p, C)
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, h, w)
