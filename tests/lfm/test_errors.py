"""Errors and credentials."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.errors import DataError, hide_credentials

SECRETS = st.text(string.ascii_letters + string.digits + "+/=%@!&?", min_size=6)


@given(secret=SECRETS, scheme=st.sampled_from(["s3", "https", "sftp", "memory", "gs"]))
def test_no_password_of_a_url_is_printed(secret: str, scheme: str) -> None:
    hidden = hide_credentials(f"cannot read {scheme}://user:{secret}@bucket/folder/000000.tar: refused")
    assert hidden == f"cannot read {scheme}://***@bucket/folder/000000.tar: refused"


@given(secret=SECRETS)
def test_no_query_of_a_url_is_printed(secret: str) -> None:
    hidden = str(DataError(f'{{"a": "https://host/x.tar?sig={secret}"}}'))
    assert hidden == '{"a": "https://host/x.tar?***"}'


def test_a_token_is_not_printed() -> None:
    assert hide_credentials("https://hf_secret@host/x") == "https://***@host/x"


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b/c",
        "abfs://container@account.dfs.core.windows.net/x",
        "hf://datasets/user/name@main/x",
        "a@b: c?d",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert hide_credentials(text) == text
