"""Tests of attention: every library computes the formula, and only `auto` chooses another one."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from lfm.errors import ConfigError
from lfm.models import attention
from lfm.models.attention import SelfAttention, attend


@pytest.fixture(autouse=True)
def forget_what_was_tried() -> Iterator[None]:
    attention.xformers_problem.cache_clear()
    yield
    attention.xformers_problem.cache_clear()


def tensors(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.Tensor]:
    """Return query, key and value (2, 7, 3, 16)."""
    return list(torch.randn(3, 2, 7, 3, 16, generator=torch.Generator().manual_seed(0)).to(device, dtype))


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_attention_is_the_softmax_of_the_formula(backend: str) -> None:
    query, key, value = tensors(torch.float64)
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key).div(16**0.5).softmax(-1)
    torch.testing.assert_close(attend(query, key, value, backend), torch.einsum("bhqk,bkhd->bqhd", weights, value))


def test_self_attention_splits_into_q_k_v_then_heads() -> None:
    module = SelfAttention(12, num_heads=3)
    tokens = torch.randn(2, 5, 12)
    query, key, value = (part.view(2, 5, 3, 4) for part in module.qkv(tokens).split(12, dim=-1))
    expected = module.projection(attend(query, key, value).reshape(2, 5, 12))
    torch.testing.assert_close(module(tokens), expected)


def test_xformers_on_a_cpu_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^`attention` xformers: cannot be used: .*CUDA only; set it to .*sdpa$"):
        attend(*tensors(), backend="xformers")


def test_auto_on_a_cpu_does_not_import_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it would raise
    assert attend(*tensors()).shape == (2, 7, 3, 16)
    assert attention.xformers_problem.cache_info().currsize == 0


@pytest.fixture
def broken_xformers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Install an xformers that can be imported and fails in every call, like one built for another CUDA; count the calls."""
    calls: list[int] = []

    def refuse(*_: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        raise NotImplementedError("No operator found\nfor `memory_efficient_attention_forward`")

    package, operators = ModuleType("xformers"), ModuleType("xformers.ops")
    operators.memory_efficient_attention = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", operators)
    monkeypatch.setattr(attention, "_preload_cuda_12_runtime", lambda: None)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options))
    return calls


def test_an_xformers_that_fails_is_tried_once_and_its_reason_logged(
    broken_xformers: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger=attention.__name__):
        problems = {attention.xformers_problem(torch.bfloat16, 64) for _ in range(3)}
    assert problems == {"NotImplementedError: No operator found"}
    assert len(broken_xformers) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "attention: torch's sdpa for torch.bfloat16, head_dim 64; "
        "xformers fails: NotImplementedError: No operator found"
    ]


def test_a_warning_of_xformers_is_no_failure(broken_xformers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings are errors in these tests, as with python -W error; Triton's are of deprecated functions."""

    def warn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        broken_xformers.append(1)
        warnings.warn("tl.make_block_ptr is deprecated", DeprecationWarning, stacklevel=2)
        return query + key + value

    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", warn)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert attention.xformers_problem(torch.bfloat16, 64) is None
    assert len(broken_xformers) == 1
    with pytest.raises(DeprecationWarning):  # the filter of the process is as before
        warn(*tensors())


class OnCuda:
    """The attributes of a CUDA tensor that the choice of the backend depends on."""

    is_cuda = True
    dtype = torch.bfloat16
    shape = (1, 8, 1, 64)


def test_on_cuda_only_auto_falls_back(broken_xformers: list[int]) -> None:
    assert not attention._use_xformers(OnCuda(), "auto")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="No operator found; set it to auto or sdpa"):
        attention._use_xformers(OnCuda(), "xformers")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xformers_equals_sdpa(dtype: torch.dtype) -> None:
    pytest.importorskip("xformers")
    query, key, value = tensors(dtype, "cuda")
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        attend(query, key, value, "xformers"), attend(query, key, value, "sdpa"), atol=tolerance, rtol=tolerance
    )
