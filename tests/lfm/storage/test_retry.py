"""Retries: which errors, and for how long."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest
from tenacity import wait_none

from lfm.storage import retry


def failing(times: int, error: Exception, calls: list[int]) -> Callable[[], str]:
    """Return a request that raises `error` so many times, and then succeeds."""

    def request() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "content"

    return request


@pytest.fixture(autouse=True)
def no_pauses_and_no_time_for_a_first_contact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "wait_random_exponential", lambda **options: wait_none())
    monkeypatch.setattr(retry, "FIRST_CONTACT_LIMIT", 0.0)


@pytest.mark.parametrize("first_answer", ["content", "no such file", None])
def test_a_server_that_has_answered_is_retried_for_longer(first_answer: str | None) -> None:
    server, calls = f"s3://{uuid.uuid4().hex}", list[int]()
    if first_answer == "content":
        retry.with_retries(f"{server}/a", failing(0, OSError(), []))
    elif first_answer:
        with pytest.raises(FileNotFoundError):
            retry.with_retries(f"{server}/a", failing(1, FileNotFoundError(), []))
    request = failing(3, ConnectionRefusedError(), calls)
    if first_answer:
        assert retry.with_retries(f"{server}/b/c", request) == "content"
    else:
        with pytest.raises(ConnectionRefusedError):
            retry.with_retries(f"{server}/b/c", request)
    assert len(calls) == (4 if first_answer else 1)
