"""Tests of the DiT: initialization, gradients, precision, refused inputs, and values recorded from the paper's code."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lfm.conversion.published_checkpoints import our_name
from lfm.errors import ConfigError
from lfm.flow.path import path_sample, squared_error
from lfm.models.dit import DiT
from lfm.models.dit_config import DIT_SIZES, DiTConfig
from lfm.models.embeddings import ClassEmbedding, TimeEmbedding, sincos_position_embedding
from lfm.types import Condition
from tests.support.models import SMALL_DIT, dit_inputs, randomized_dit
from tests.support.recorded_values import GRADIENT_STRIDE, recorded, recorded_model


def test_the_first_velocity_is_zero_and_every_block_the_identity() -> None:
    model = DiT(SMALL_DIT)
    state, time, classes = dit_inputs()
    assert not model(state, time, Condition(classes)).any()
    tokens, signal = torch.randn(3, 16, 32), torch.randn(3, 32)
    assert all(torch.equal(block(tokens, signal), tokens) for block in model.blocks)


def test_initial_weights_have_the_published_standard_deviations() -> None:
    torch.manual_seed(0)
    model = DiT(dataclasses.replace(SMALL_DIT, hidden_size=192, num_heads=3, num_classes=1000))
    spread = {name: float(parameter.detach().std()) for name, parameter in model.named_parameters()}
    for name in ("time_embedding.mlp.0.weight", "time_embedding.mlp.2.weight", "class_embedding.table.weight"):
        assert spread[name] == pytest.approx(0.02, rel=0.02)
    assert spread["blocks.0.attention.qkv.weight"] == pytest.approx(math.sqrt(2 / (192 + 576)), rel=0.02)
    assert spread["patch_embedding.weight"] == pytest.approx(math.sqrt(2 / (192 + 16)), rel=0.03)
    assert all(value == 0 for name, value in spread.items() if name.endswith("bias") or "modulation" in name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter(checkpointing: bool) -> None:
    tasks = {"condition_channels": 1, "num_labels": 3, "downsample_factor": 2}
    model = randomized_dit(dataclasses.replace(SMALL_DIT, activation_checkpointing=checkpointing, **tasks))
    state, time, classes = dit_inputs()
    condition = Condition(classes, torch.rand(3, 1, 8, 8), torch.arange(3 * 256).view(3, 16, 16) % 4)
    model(state, time, condition).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = randomized_dit(dataclasses.replace(SMALL_DIT, activation_checkpointing=checkpointing))
        state, time, classes = dit_inputs()
        model(state, time, Condition(classes)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_a_row_depends_on_its_own_input_alone() -> None:
    model = randomized_dit(SMALL_DIT)
    state, time, classes = dit_inputs()
    whole = model(state, time, Condition(classes))
    alone = model(state[1:2], time[1:2], Condition(classes[1:2]))
    torch.testing.assert_close(whole[1:2], alone)


def test_train_and_eval_mode_agree() -> None:
    model = randomized_dit(SMALL_DIT)
    state, time, classes = dit_inputs()
    assert torch.equal(model.train()(state, time, Condition(classes)), model.eval()(state, time, Condition(classes)))


def test_a_bfloat16_model_returns_float32_close_to_that_of_a_float32_model() -> None:
    state, time, classes = dit_inputs()
    exact = randomized_dit(SMALL_DIT)(state, time, Condition(classes))
    with torch.autocast("cpu", torch.bfloat16):
        cast = randomized_dit(SMALL_DIT)(state, time, Condition(classes))
    for rough in (cast, randomized_dit(SMALL_DIT).bfloat16()(state, time, Condition(classes))):
        assert exact.dtype == rough.dtype == torch.float32
        assert (exact - rough).norm() < 0.03 * exact.norm()


def test_statistics_of_a_bfloat16_norm_are_float32() -> None:
    norm = DiT(SMALL_DIT).bfloat16().blocks[0].norm
    tokens = (100 + torch.randn(4, 32)).bfloat16()
    torch.testing.assert_close(norm(tokens).float(), norm(tokens.float()), atol=1e-2, rtol=1e-2)


def test_the_backend_of_the_configuration_is_the_one_that_is_used() -> None:
    state, time, classes = dit_inputs()
    with pytest.raises(ConfigError, match="`attention` xformers: cannot be used"):
        DiT(dataclasses.replace(SMALL_DIT, attention="xformers"))(state, time, Condition(classes))


def test_time_is_float32_until_after_the_frequencies() -> None:
    embedding = TimeEmbedding(32).bfloat16()
    near, far = torch.tensor([0.8990]), torch.tensor([0.8994])  # one and the same in bfloat16
    assert near.bfloat16() == far.bfloat16()
    assert embedding.frequencies(near).dtype == torch.float32
    assert (embedding.frequencies(near) - embedding.frequencies(far)).abs().max() > 0.1


def test_a_scale_of_1000_makes_most_frequencies_vary() -> None:
    time = torch.linspace(0, 1, 101)

    def varying(scale: float) -> int:
        return int((TimeEmbedding(32, scale=scale).frequencies(time).std(0) > 0.05).sum())

    assert varying(1000.0) > 190 > 80 > varying(1.0)


def test_the_null_class_has_a_row_only_with_condition_dropout() -> None:
    assert ClassEmbedding(10, 8, with_null=True).table.num_embeddings == 11
    assert DiT(SMALL_DIT).state_dict()["class_embedding.table.weight"].shape[0] == 11
    plain = DiT(dataclasses.replace(SMALL_DIT, condition_dropout=0.0))
    assert plain.state_dict()["class_embedding.table.weight"].shape[0] == 10


def test_position_embeddings_distinguish_rows_from_columns() -> None:
    grid = sincos_position_embedding(16, 3, 5).view(3, 5, 16)
    assert torch.equal(grid[0, :, :8], grid[2, :, :8])  # the first half is the column's
    assert torch.equal(grid[:, 0, 8:], grid[:, 4, 8:])  # the second half is the row's
    assert grid.view(15, 16).unique(dim=0).shape[0] == 15
    assert "position" not in DiT(SMALL_DIT).state_dict()


def test_a_condition_that_the_model_does_not_take_is_refused() -> None:
    state, time, classes = dit_inputs()
    with pytest.raises(ConfigError, match="set `class_index`"):
        DiT(SMALL_DIT)(state, time, Condition())
    unconditional = DiT(dataclasses.replace(SMALL_DIT, num_classes=None, condition_dropout=0.0))
    with pytest.raises(ConfigError, match="leave out `class_index`"):
        unconditional(state, time, Condition(classes))
    with pytest.raises(ConfigError, match="takes 0 channels"):
        unconditional(state, time, Condition(spatial=torch.rand(3, 5, 8, 8)))
    inpainting = DiT(dataclasses.replace(SMALL_DIT, num_classes=None, condition_dropout=0.0, condition_channels=5))
    with pytest.raises(ConfigError, match=r"takes 5 channels .* not 0"):
        inpainting(state, time, Condition())


def test_the_spatial_condition_changes_the_velocity() -> None:
    model = randomized_dit(
        dataclasses.replace(SMALL_DIT, num_classes=None, condition_dropout=0.0, condition_channels=5)
    )
    state, time, _ = dit_inputs()
    empty, full = (model(state, time, Condition(spatial=torch.full((3, 5, 8, 8), fill))) for fill in (0.0, 1.0))
    assert (empty - full).abs().max() > 1e-3


def test_a_pixel_of_a_segmentation_map_changes_the_embedding_of_its_cell_alone() -> None:
    config = dataclasses.replace(SMALL_DIT, num_classes=None, depth=1, num_labels=3, downsample_factor=4)
    model = randomized_dit(config)
    segmentation = torch.zeros(1, 32, 32, dtype=torch.int64)
    embedded = model.segmentation_embedding(segmentation)
    for row, column in ((0, 0), (5, 30), (31, 31)):
        changed = segmentation.clone()
        changed[0, row, column] = 2
        moved = (model.segmentation_embedding(changed) - embedded).abs().sum(1)[0] > 0
        assert moved.nonzero().tolist() == [[row // 4, column // 4]]


def test_a_segmentation_of_another_size_is_refused() -> None:
    model = randomized_dit(dataclasses.replace(SMALL_DIT, num_classes=None, num_labels=3, downsample_factor=4))
    state, time, _ = dit_inputs()
    with pytest.raises(ConfigError, match=r"takes segmentation maps of 32 pixels .*, not 16"):
        model(state, time, Condition(segmentation=torch.zeros(3, 16, 16, dtype=torch.int64)))
    with pytest.raises(ConfigError, match=r"takes segmentation maps of 32 pixels .*, not 0"):
        model(state, time, Condition())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "`hidden_size` 32: must be a multiple of `num_heads`, 3"),
        ({"hidden_size": 30}, "`hidden_size` 30: must be a multiple of 4"),
        ({"patch_size": 3}, "`latent_size` 8: must be a multiple of `patch_size`, 3"),
        ({"depth": 0}, "`depth` 0"),
        ({"num_classes": 0}, "`num_classes` 0"),
        ({"num_labels": 0}, "`num_labels` 0"),
        ({"condition_dropout": 1.0}, "`condition_dropout` 1.0"),
        ({"num_classes": None}, "`condition_dropout` 0.1: needs a condition, such as `num_classes`"),
        ({"attention": "flash"}, "`attention` flash"),
    ],
)
def test_a_configuration_that_does_not_fit_names_its_keys(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        dataclasses.replace(SMALL_DIT, **change)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "millions", "gigaflops"), [("S", 33, 6.06), ("B", 130, 23.01), ("L", 457, 80.71), ("XL", 675, 118.64)]
)
def test_sizes_are_the_published_ones(size: str, millions: int, gigaflops: float) -> None:
    hidden_size, depth, num_heads = DIT_SIZES[size]
    config = DiTConfig(4, 32, 2, hidden_size, depth, num_heads, num_classes=1000, condition_dropout=0.1)
    with torch.device("meta"):
        model = DiT(config)
    # the published networks predict a variance beside the velocity; their operations are multiply-adds
    assert model.num_parameters / 1e6 == pytest.approx(millions, rel=0.005)
    assert config.flops_per_sample / 2e9 == pytest.approx(gigaflops, rel=0.001)


def test_position_and_frequencies_are_those_of_the_paper() -> None:
    reference, model = recorded("dit_class_io"), recorded_model()
    torch.testing.assert_close(model.position, reference["act.pos_embed"][0], atol=1e-7, rtol=0)
    torch.testing.assert_close(
        model.time_embedding.frequencies(reference["t"]), reference["act.t_freq"], atol=1e-6, rtol=0
    )


@torch.no_grad()
def test_the_output_is_that_of_the_paper() -> None:
    reference, model = recorded("dit_class_io"), recorded_model()
    state, time, classes = reference["x"], reference["t"], reference["y"]
    null = torch.full_like(classes, 10)
    for name, out in {
        "out": model(state, time, Condition(classes)),
        "out_y_none": model(state, time, Condition(null)),
        "out_t_scalar": model(state, reference["t_scalar"].expand(5), Condition(classes)),
    }.items():
        torch.testing.assert_close(out, reference[name], atol=1e-5, rtol=0)


def test_loss_and_gradients_are_those_of_the_paper() -> None:
    reference, model = recorded("loss"), recorded_model()
    sample = path_sample(reference["z0"], reference["z1"], reference["t"])
    loss = squared_error(model(sample.state, sample.time, Condition(reference["y"])), sample.velocity).mean()
    torch.testing.assert_close(loss, reference["loss"], atol=1e-6, rtol=0)
    loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = {our_name(name[5:]): value for name, value in reference.items() if name.startswith("grad.")}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        rows = slice(None, None, GRADIENT_STRIDE if gradient.ndim > 1 else 1)
        torch.testing.assert_close(ours[name][rows], gradient, atol=1e-6, rtol=0)
