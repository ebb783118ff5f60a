"""Tests of the options of the DiT beyond the paper: each follows its formula, and costs what `flops_per_sample` says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lfm.data.manifest import ClassRecord
from lfm.errors import ConfigError
from lfm.models import dit
from lfm.models.attention import SelfAttention
from lfm.models.dit import DiT
from lfm.models.dit_blocks import SwiGLU
from lfm.models.dit_config import DIT_SIZES, DiTConfig
from lfm.models.embeddings import grid_coordinates, rotate, rotation_of
from lfm.types import Condition
from lfm.weights_file import load_weights, save_weights
from tests.support.models import SMALL_DIT, WEIGHTS_HEADER, dit_inputs, randomized_dit

OPTIONS: dict[str, dict[str, Any]] = {
    "rope": {"position": "rope"},
    "rms": {"norm": "rms"},
    "swiglu": {"mlp": "swiglu"},
    "relu2": {"mlp": "relu2"},
    "qk_norm": {"qk_norm": True},
    "value_residual": {"value_residual": True},
    "dropping": {"token_dropout": 0.4},
    "checkpointing": {"activation_checkpointing": 2},
}
OPTIONS["all"] = {key: value for option in OPTIONS.values() for key, value in option.items()} | {"mlp": "swiglu"}
each_option = pytest.mark.parametrize("option", OPTIONS)


def configured(option: str, **changes: Any) -> DiTConfig:
    return dataclasses.replace(SMALL_DIT, **OPTIONS[option] | changes)


def kept_tokens(config: DiTConfig) -> torch.Tensor | None:
    """Return the numbers of random tokens for each of 3 rows; None for a model without token dropout."""
    if not config.token_dropout:
        return None
    order = torch.rand(3, config.num_tokens, generator=torch.Generator().manual_seed(2)).argsort(1)
    return order[:, : config.num_kept_tokens]


def velocity(model: DiT, kept: torch.Tensor | None = None) -> torch.Tensor:
    state, time, classes = dit_inputs()
    return model(state, time, Condition(classes), kept)


@each_option
def test_gradients_reach_every_parameter(option: str) -> None:
    model = randomized_dit(configured(option, depth=5))
    velocity(model, kept_tokens(model.config)).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@each_option
def test_the_first_velocity_is_zero(option: str) -> None:
    torch.manual_seed(0)
    assert not velocity(DiT(configured(option))).any()


@each_option
def test_bfloat16_stays_close_to_float32(option: str) -> None:
    config = configured(option, latent_size=32)  # far positions: as bfloat16, coordinates would be rough
    state, time, classes = dit_inputs(size=32)
    kept = kept_tokens(config)
    exact = randomized_dit(config)(state, time, Condition(classes), kept)
    rough = randomized_dit(config).bfloat16()(state, time, Condition(classes), kept)
    assert rough.dtype == torch.float32
    assert (exact - rough).norm() < 0.03 * exact.norm()


@each_option
def test_the_cost_is_the_one_that_torch_counts(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return (query @ key.transpose(-1, -2)).softmax(-1) @ value

    monkeypatch.setattr("lfm.models.attention.scaled_dot_product_attention", attention)  # the CPU's own is not counted
    config = configured(option, hidden_size=96, depth=5, condition_channels=2)  # 2/3 of 384 is a multiple of 8
    state, time, classes = dit_inputs()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        DiT(config)(state, time, Condition(classes, torch.rand(3, 2, 8, 8)), kept_tokens(config))
    assert counter.get_total_flops() == 3 * config.flops_per_sample


@each_option
def test_options_survive_saving_and_loading(option: str, tmp_path: Path) -> None:
    model, path = randomized_dit(configured(option)), str(tmp_path / "weights.safetensors")
    classes = tuple(
        ClassRecord(index=index, name=str(index), count=1) for index in range(model.config.num_classes or 0)
    )
    save_weights(path, model.state_dict(), dataclasses.replace(WEIGHTS_HEADER, model=model.config, classes=classes))
    tensors, header = load_weights(path)
    again = DiT(header.model)
    again.load_state_dict(tensors)
    assert header.model == model.config
    assert torch.equal(velocity(again), velocity(model))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_values_of_later_blocks_are_mixed_with_those_of_the_first(dropout: float) -> None:
    config = configured("value_residual", depth=5, token_dropout=dropout)
    model, plain = randomized_dit(config), DiT(dataclasses.replace(config, value_residual=False))
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "value_mix" not in name})
    mixes = [block.attention.value_mix for block in model.blocks[1:]]
    assert model.blocks[0].attention.value_mix is None
    kept = kept_tokens(config)
    for factors, is_same in (((0.0, 1.0), True), ((0.5, 0.5), False)):
        with torch.no_grad():
            for mix in mixes:
                mix.copy_(torch.tensor(factors))
            assert torch.allclose(velocity(model, kept), velocity(plain, kept), atol=1e-6) == is_same
    attention = SelfAttention(8, num_heads=2, value_residual=True)
    tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    first = torch.randn(2, 5, 2, 4, generator=torch.Generator().manual_seed(1))
    own = attention.qkv(tokens).chunk(3, -1)[2].unflatten(-1, (2, 4))
    result, value = attention(tokens, None, first, True)
    torch.testing.assert_close(value, 0.5 * first + 0.5 * own)
    assert result.shape == tokens.shape


@settings(max_examples=30, deadline=None)
@given(
    here=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    there=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    shift=st.tuples(st.integers(0, 60), st.integers(0, 60)),
)
def test_rotated_products_depend_on_the_difference_of_positions_alone(
    here: tuple[int, int], there: tuple[int, int], shift: tuple[int, int]
) -> None:
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def product(at: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        turned = rotate(query, rotation_of(at, 16)), rotate(key, rotation_of(to, 16))
        torch.testing.assert_close(turned[0].norm(), query.norm())
        return (turned[0] * turned[1]).sum()

    at, to, by = (torch.tensor([place]) for place in (here, there, shift))
    torch.testing.assert_close(product(at, to), product(at + by, to + by), atol=1e-4, rtol=0)
    assert torch.equal(rotate(query, rotation_of(0 * at, 16)), query)


def test_rotations_distinguish_rows_from_columns_and_are_exact_in_bfloat16() -> None:
    grid = rotation_of(grid_coordinates(3, 5), 16).view(2, 3, 5, 8)
    assert torch.equal(grid[:, 0, :, :4], grid[:, 0, :1, :4].expand(-1, 5, -1))  # the first half is the row's
    assert torch.equal(grid[:, :, 0, 4:], grid[:, :1, 0, 4:].expand(-1, 3, -1))
    assert grid.flatten(1, 2).permute(1, 0, 2).flatten(1).unique(dim=0).shape[0] == 15
    model = DiT(configured("rope"))
    assert "position" not in model.state_dict()
    assert torch.equal(model.bfloat16().position, grid_coordinates(4, 4))


def test_rope_alone_makes_the_velocity_depend_on_positions() -> None:
    """Without any position, permuted patches give permuted velocities."""
    model = randomized_dit(configured("rope"))
    state, time, classes = dit_inputs()
    mirrored = model(state.flip(-1), time, Condition(classes)).flip(-1)
    assert (mirrored - velocity(model)).abs().max() > 1e-3


def test_normalized_queries_and_keys_have_bounded_products(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: str) -> torch.Tensor:
        products.append(float((torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5).abs().max()))
        return value

    monkeypatch.setattr("lfm.models.attention.attend", attend)
    tokens = 1000 * torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    for qk_norm in (True, False):
        torch.manual_seed(0)
        with torch.no_grad():
            SelfAttention(32, num_heads=2, qk_norm=qk_norm)(tokens)
    assert products[0] <= 16**0.5 * (1 + 1e-5)
    assert products[1] > 1000


def test_rms_norm_is_its_formula_with_statistics_in_float32() -> None:
    norm = DiT(configured("rms")).blocks[0].norm
    tokens = 5 + torch.randn(4, 32)
    torch.testing.assert_close(norm(tokens), tokens / (tokens.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    rough = (100 + torch.randn(4, 32)).bfloat16()
    torch.testing.assert_close(norm.bfloat16()(rough).float(), norm(rough.float()), atol=1e-2, rtol=1e-2)


def test_swiglu_is_its_formula_and_has_as_many_parameters() -> None:
    pair = torch.randn(3, 10)
    torch.testing.assert_close(SwiGLU()(pair), pair[:, :5] / (1 + (-pair[:, :5]).exp()) * pair[:, 5:])
    for size in ("S", "B", "L", "XL"):
        counts = []
        for mlp in ("gelu", "swiglu"):
            with torch.device("meta"):
                counts.append(DiT(DiTConfig(4, 32, 2, *DIT_SIZES[size], mlp=mlp)).num_parameters)
        assert counts[1] == pytest.approx(counts[0], rel=2e-3)


@pytest.mark.parametrize("position", ["sincos", "rope"])
def test_keeping_every_token_in_any_order_changes_nothing(position: str) -> None:
    model = randomized_dit(configured("dropping", position=position, depth=5))
    order = torch.rand(3, 16).argsort(1)
    torch.testing.assert_close(velocity(model, order), velocity(model))


@pytest.mark.parametrize("position", ["sincos", "rope"])
def test_a_dropped_token_bypasses_the_middle_blocks_and_has_no_effect_there(position: str) -> None:
    model = randomized_dit(configured("dropping", position=position))  # of 2 blocks: both are in the middle
    state, time, classes = dit_inputs()
    kept = torch.arange(16)[None].repeat(3, 1)[:, 4:]  # all but the first row of patches
    changed = state.clone()
    changed[:, :, :2] += 1
    before, after = (model(x, time, Condition(classes), kept) for x in (state, changed))
    torch.testing.assert_close(before[:, :, 2:], after[:, :, 2:])
    for row in range(4):  # nor does it hear the others: its velocity is that of its own patch
        alone = torch.zeros_like(state)
        alone[..., :2, 2 * row : 2 * row + 2] = state[..., :2, 2 * row : 2 * row + 2]
        expected = model(alone, time, Condition(classes), kept)[..., :2, 2 * row : 2 * row + 2]
        torch.testing.assert_close(before[..., :2, 2 * row : 2 * row + 2], expected)
    assert (before - velocity(model)).abs().max() > 1e-3


def test_the_first_and_last_blocks_see_every_token() -> None:
    seen: list[int] = []
    model = randomized_dit(configured("dropping", depth=8))
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    velocity(model, kept_tokens(model.config))
    assert seen == [16, 16, 10, 10, 10, 10, 16, 16]
    assert [len(configured("dropping", depth=depth).middle_blocks) for depth in (1, 4, 12, 28)] == [1, 2, 8, 24]


@pytest.mark.parametrize(("every", "blocks"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])])
def test_every_nth_block_is_checkpointed_without_a_changed_gradient(
    every: int, blocks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = dit.checkpoint

    def counted(block: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        seen.append(list(model.blocks).index(block))
        return original(block, *arguments, **options)

    monkeypatch.setattr(dit, "checkpoint", counted)
    gradients = []
    for checkpointing in (0, every):
        model = randomized_dit(configured("all", depth=5, activation_checkpointing=checkpointing))
        velocity(model, kept_tokens(model.config)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert seen == blocks
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize("option", ["swiglu", "all"])
def test_compiled_blocks_share_their_graphs_and_keep_names_and_velocity(option: str) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    graphs = CompileCounter()
    model = randomized_dit(configured(option, depth=12, activation_checkpointing=0))
    names, expected = list(model.state_dict()), velocity(model, kept_tokens(model.config))
    model.compile_blocks(backend=graphs)
    torch.testing.assert_close(velocity(model, kept_tokens(model.config)), expected)
    assert list(model.state_dict()) == names
    # All tokens, kept tokens, and the first block with a value residual: not one for each block.
    assert 1 <= graphs.frame_count <= 3 + model.config.value_residual


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.slow
def test_blocks_compiled_by_inductor_have_the_same_gradients() -> None:
    gradients = []
    for compiled in (False, True):
        model = randomized_dit(configured("all", depth=1, activation_checkpointing=0))
        if compiled:
            model.compile_blocks()
        velocity(model, kept_tokens(model.config)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, fast, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": "rope", "hidden_size": 36, "num_heads": 6}, "`position` rope: `hidden_size` / `num_heads`"),
        ({"position": "alibi"}, "`position` alibi"),
        ({"norm": "batch"}, "`norm` batch"),
        ({"mlp": "relu"}, "`mlp` relu"),
        ({"token_dropout": 1.0}, "`token_dropout` 1.0"),
    ],
)
def test_an_option_that_does_not_fit_names_its_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL_DIT, **change)
