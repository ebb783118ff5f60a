"""Retries of requests that fail for a transient reason: exponential, jittered pauses, for at most ten minutes.

A server that has not answered this process before is retried for one minute alone: its address is probably wrong.
"""

from __future__ import annotations

import errno
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_before_delay, wait_random_exponential

from lfm.errors import hide_credentials, on_one_line

TIME_LIMIT = 600.0  # seconds
FIRST_CONTACT_LIMIT = 60.0  # seconds, until a server has answered for the first time
# The errors of the operating system that may pass. Many libraries raise an OSError without a number.
_TRANSIENT_NUMBERS = {
    None,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.EPIPE,
    errno.ESTALE,
    errno.ETIMEDOUT,
    socket.EAI_AGAIN,  # a name server that does not answer; an unknown host is EAI_NONAME
}
_LASTING_TYPES = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ssl.SSLCertVerificationError,
)
# Errors of the protocols' libraries, by name, since none of these libraries need be installed.
_TRANSIENT_NAMES = {
    # botocore
    "HTTPClientError",
    "EndpointConnectionError",
    "IncompleteReadError",
    "FlexibleChecksumError",
    # aiohttp
    "ClientPayloadError",
    "ServerDisconnectedError",
    # azure, gcsfs
    "ServiceRequestError",
    "ServiceResponseError",
    "HttpError",
}

T = TypeVar("T")
_servers_reached: set[str] = set()  # protocol and host of the URLs that have answered a request


def with_retries(name: str, request: Callable[[], T], on_retry: Callable[[], None] = lambda: None) -> T:
    """Return `request()`, calling it again while it fails for a transient reason.

    The pauses are random, so that ranks that failed together do not retry together.

    Args:
        name: the path or URL, for the log; its server has the longer limit once it has answered.
        on_retry: called before each retry.

    Raises:
        Exception: the last error of `request`, if it is lasting or the time limit is reached.
    """

    def before_sleep(state: RetryCallState) -> None:
        assert state.outcome is not None
        logging.getLogger(__name__).warning(
            "%s: %s; retrying in %.1f s",
            hide_credentials(name),
            on_one_line(state.outcome.exception()),
            state.upcoming_sleep,
        )
        on_retry()

    server = "/".join(name.split("/", 3)[:3])  # s3://bucket
    retrying = Retrying(
        retry=retry_if_exception(is_transient),
        wait=wait_random_exponential(multiplier=1, min=0.2, max=60),
        stop=stop_before_delay(TIME_LIMIT if server in _servers_reached else FIRST_CONTACT_LIMIT),
        before_sleep=before_sleep,
        reraise=True,
    )
    try:
        result = retrying(request)
    except Exception as error:
        if not is_transient(error):  # an answer, such as that there is no such file
            _servers_reached.add(server)
        raise
    _servers_reached.add(server)
    return result


def is_transient(error: BaseException) -> bool:
    """Return whether a request that failed with `error` may succeed later.

    A library's own error is judged by the operating system's error that caused it, if there is one: connecting to S3 fails
    with the same `EndpointConnectionError` for a refused connection (transient) and for an unknown host (lasting).
    """
    if not isinstance(error, OSError) and not any(kind.__name__ in _TRANSIENT_NAMES for kind in type(error).__mro__):
        return False
    cause = next((link for link in _causes(error) if isinstance(link, OSError)), None)
    if cause is None:
        return True
    if isinstance(cause, _LASTING_TYPES):
        return False
    return isinstance(cause, ssl.SSLError) or cause.errno in _TRANSIENT_NUMBERS


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error itself, then the errors that it was raised from."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
