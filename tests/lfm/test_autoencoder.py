"""The autoencoder is known by its weights, refused where they do not fit, and neither darkens nor clips an image."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lfm import autoencoder as autoencoders
from lfm.autoencoder import Autoencoder, check_storable, import_diffusers, load, to_levels, to_unit_range
from lfm.errors import ConfigError, DataError
from lfm.types import Posterior

WEIGHTS = "diffusion_pytorch_model.safetensors"
IMAGES = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture(scope="module", autouse=True)
def quiet_diffusers() -> None:
    import_diffusers()
    logging.getLogger("diffusers").setLevel(logging.CRITICAL)


def tiny_kl(**changes: Any) -> Any:
    """An AutoencoderKL of few weights."""
    torch.manual_seed(0)
    options = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "latent_channels": 4,
    }
    return import_diffusers().AutoencoderKL(**options | changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder")
    tiny_kl().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path | str) -> str:
    """The one line that a folder is refused with."""
    with pytest.raises(ConfigError) as error:
        load(str(folder))
    assert str(error.value).startswith(f"autoencoder {folder}: ") and "\n" not in str(error.value)
    return str(error.value)


def test_what_is_loaded_encodes_and_decodes_as_what_was_saved(saved: Path) -> None:
    original, loaded = Autoencoder(tiny_kl(), "x"), load(str(saved))
    assert loaded.name == str(saved) and loaded.content_hash == original.content_hash
    posterior = loaded.encode(IMAGES)
    assert posterior.mean.shape == posterior.std.shape == (3, 4, 8, 8)
    assert posterior.mean.dtype == posterior.std.dtype == torch.float32 and (posterior.std > 0).all()
    torch.testing.assert_close(posterior.mean, original.encode(IMAGES).mean, rtol=1e-4, atol=1e-5)
    images = loaded.decode(posterior.mean * loaded.scale_factor)
    assert images.shape == IMAGES.shape and images.dtype == torch.uint8
    expected = original.decode(posterior.mean * original.scale_factor)
    assert (images.int() - expected.int()).abs().max() <= 1


def test_it_is_frozen_and_knows_its_sizes(saved: Path) -> None:
    model = load(str(saved))
    assert not model.model.training and not any(p.requires_grad for p in model.model.parameters())
    assert (model.latent_channels, model.downsample_factor, model.latent_size(64)) == (4, 2, 32)
    assert (model.scale_factor, model.shift) == (0.18215, 0.0)
    with pytest.raises(ConfigError, match=r"^`image_size` 63: not divisible .* factor 2; choose another$"):
        model.latent_size(63)


def test_the_vae_of_a_whole_pipeline_is_found(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "pipeline" / "vae")
    assert load(str(tmp_path / "pipeline")).content_hash == load(str(saved)).content_hash


def test_the_content_hash_changes_with_any_weight_and_with_the_scaling(saved: Path) -> None:
    known = {load(str(saved)).content_hash}
    model = tiny_kl()
    for parameter in list(model.parameters())[::5]:
        with torch.no_grad():
            parameter.view(-1)[-1] = torch.nextafter(parameter.view(-1)[-1], torch.tensor(torch.inf))
        changed = Autoencoder(model, "x").content_hash
        assert changed not in known
        known.add(changed)
    for changes in ({"scaling_factor": 0.2325}, {"shift_factor": 0.1}):
        assert Autoencoder(tiny_kl(**changes), "x").content_hash not in known
    assert Autoencoder(tiny_kl(), "another name").content_hash in known


def test_the_content_hash_is_the_same_at_every_precision(saved: Path) -> None:
    """`lfm encode --precision bf16`, then `lfm sample`: it is one autoencoder, and must not be refused as another."""
    assert load(str(saved), precision="bf16").content_hash == load(str(saved)).content_hash


def test_bfloat16_is_near_float32_and_comes_back_as_float32(saved: Path) -> None:
    exact, rough = load(str(saved)), load(str(saved), precision="bf16")
    posterior = rough.encode(IMAGES)
    assert posterior.mean.dtype == posterior.std.dtype == torch.float32
    torch.testing.assert_close(posterior.mean, exact.encode(IMAGES).mean, atol=0.05, rtol=0.05)
    assert rough.decode(posterior.mean).dtype == torch.uint8


def test_scale_and_shift_are_undone_before_decoding() -> None:
    model = Autoencoder(tiny_kl(scaling_factor=0.5, shift_factor=0.25), "x")
    unscaled = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = to_levels(model.model.decode(unscaled).sample)
    # A processor may round (x - 0.25) * 0.5 / 0.5 + 0.25 to another neighbour of x, and so a level at a border.
    assert (model.decode((unscaled - 0.25) * 0.5).int() - expected.int()).abs().max() <= 1
    assert not torch.equal(model.decode(unscaled), expected)


@pytest.mark.parametrize(
    ("kind", "options", "factor"),
    [
        ("AutoencoderTiny", {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
                             "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}, 2),
        ("AutoencoderDC", {"latent_channels": 4, "attention_head_dim": 8, "scaling_factor": 0.5,
                           **{f"{side}_block_out_channels": (8, 16, 16) for side in ("encoder", "decoder")},
                           **{f"{side}_layers_per_block": (1, 1, 1) for side in ("encoder", "decoder")},
                           **{f"{side}_qkv_multiscales": ((), (), ()) for side in ("encoder", "decoder")}}, 4),
        ("AsymmetricAutoencoderKL", {"down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 4,
                                     "down_block_out_channels": (8, 8), "up_block_out_channels": (8, 16),
                                     "up_block_types": ("UpDecoderBlock2D",) * 2}, 2),
    ],
)  # fmt: skip
def test_other_autoencoders_of_diffusers_serve_too(
    tmp_path: Path, kind: str, options: dict[str, Any], factor: int
) -> None:
    model = getattr(import_diffusers(), kind)(**options)
    model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert (loaded.downsample_factor, loaded.scale_factor) == (factor, model.config.scaling_factor)
    posterior, size = loaded.encode(IMAGES), IMAGES.shape[-1] // factor
    assert posterior.mean.shape == posterior.std.shape == (3, 4, size, size)
    assert posterior.mean.any() and posterior.std.any() == (kind == "AsymmetricAutoencoderKL"), "else deterministic"
    scaled = posterior.mean * loaded.scale_factor
    with torch.inference_mode():
        expected = to_levels(model.eval().decode(posterior.mean).sample)
    assert (loaded.decode(scaled).int() - expected.int()).abs().max() <= 1


# --- refusals ----------------------------------------------------------------------------------------------------


def test_a_missing_path_is_one_line(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere")


@pytest.mark.parametrize("length", [0, 5, 5000])
def test_truncated_weights_are_one_line(copy: Path, length: int) -> None:
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:length])
    refused(copy)


def test_a_folder_without_weights_is_one_line(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    refused(copy)


@pytest.mark.parametrize("changes", [{"layers_per_block": 2}, {"latent_channels": 8}, {"block_out_channels": [8, 16]}])
def test_weights_that_do_not_match_the_config_are_one_line(copy: Path, changes: dict[str, Any]) -> None:
    edit_config(copy, **changes)
    refused(copy)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_one_wrong_weight_is_named(copy: Path, change: str) -> None:
    tensors = load_file(copy / WEIGHTS)
    if change == "missing":
        del tensors["decoder.conv_out.bias"]
    else:
        tensors["decoder.conv_out.extra"] = torch.zeros(1)
    save_file(tensors, copy / WEIGHTS)
    assert f"do not match its config.json: 1 {change} keys, such as decoder.conv_out." in refused(copy)


def test_a_wrong_shape_is_named(copy: Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    tensors["decoder.conv_out.bias"] = torch.zeros(5)
    save_file(tensors, copy / WEIGHTS)
    assert "decoder.conv_out.bias" in refused(copy)


@pytest.mark.parametrize("config", ["", "{", "[]", "{}", '{"_class_name": "Nothing"}'])
def test_a_config_that_is_none_is_one_line(copy: Path, config: str) -> None:
    (copy / "config.json").write_text(config)
    refused(copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("scaling_factor", value) for value in (-1, "a", [1], 1e300, float("nan"))),
        *(("shift_factor", value) for value in ([[]], "a", {"a": 1}, float("inf"))),
        *(("block_out_channels", value) for value in ([10**9, 8], [-8, 8], [8] * 5000, "a")),
        *(("layers_per_block", value) for value in (10**6, -1, None)),
    ],
)
def test_a_value_of_the_config_out_of_range_is_one_line(copy: Path, key: str, value: object) -> None:
    config = json.loads((copy / "config.json").read_text()) | {key: value}
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy)


@pytest.mark.parametrize("value", [0.5, 4.0, True, "4"])
@pytest.mark.parametrize("key", ["norm_num_groups", "latent_channels", "layers_per_block", "block_out_channels"])
def test_a_count_in_the_config_that_is_no_integer_is_one_line(copy: Path, key: str, value: object) -> None:
    edit_config(copy, **{key: [8, value] if key == "block_out_channels" else value})
    with pytest.raises(ConfigError, match=rf"{key} {re.escape(str(value))}: must be an integer"):
        load(str(copy))


@pytest.mark.parametrize("key", ["in_channels", "out_channels"])
def test_an_autoencoder_of_other_channels_than_rgb_is_one_line(tmp_path: Path, key: str) -> None:
    tiny_kl(**{key: 1}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"{key} 1: must be 3"):
        load(str(tmp_path))


def test_another_kind_of_model_is_one_line(tmp_path: Path) -> None:
    """The folder beside `vae` in a pipeline is `unet`: an easy mistake."""
    unet = import_diffusers().UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    unet.save_pretrained(tmp_path / "unet")
    refused(tmp_path / "unet")


# --- levels and storage ------------------------------------------------------------------------------------------


def test_every_level_survives_and_between_them_it_is_rounded() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_levels(to_unit_range(levels)), levels)
    assert to_unit_range(levels)[[0, -1]].tolist() == [-1, 1]
    nearly = (torch.tensor([9.51, 10.49, 254.6]) / 127.5) - 1
    assert to_levels(nearly).tolist() == [10, 10, 255], "truncation would give 9, 10, 254"
    assert to_levels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@settings(max_examples=20, deadline=None)
@given(
    where=st.sampled_from(["mean", "std"]),
    value=st.sampled_from([1e5, -1e5, 65_504.0, float("inf"), float("-inf"), float("nan")]),
    row=st.integers(0, 2),
)
def test_what_float16_cannot_hold_is_refused_by_its_key(where: str, value: float, row: int) -> None:
    tensors = {"mean": torch.zeros(3, 2, 4, 4), "std": torch.zeros(3, 2, 4, 4)}
    tensors[where][row, 1, 2, 3] = value
    if where == "std" and value < 0:
        return
    with pytest.raises(DataError, match=f"^sample k{row}: .*float16") as error:
        check_storable(Posterior(**tensors), ["k0", "k1", "k2"])
    assert "\n" not in str(error.value)


def test_what_float16_holds_is_accepted() -> None:
    check_storable(Posterior(torch.full((2, 1, 2, 2), -59_000.0), torch.full((2, 1, 2, 2), 59_000.0)), ["a", "b"])


def test_the_embedded_autoencoder_lies_in_the_package() -> None:
    assert autoencoders.embedded_path().parent.parent == Path(autoencoders.__file__).parent
