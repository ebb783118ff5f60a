"""Trying again, where a failing network or a busy store is the reason: with growing, jittered pauses, for ten minutes."""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = 600.0  # seconds
_PAUSES = (0.5, 60.0)  # seconds before the second request, and the longest
# Of the operating system's errors all may pass but these, and of the libraries' own those alone.
_LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_PASSING = {
    *("HTTPClientError", "EndpointConnectionError", "IncompleteReadError", "FlexibleChecksumError"),  # botocore
    *("ClientPayloadError", "ServerDisconnectedError"),  # aiohttp
    *("ServiceRequestError", "ServiceResponseError", "HttpError"),  # azure, gcsfs
}

T = TypeVar("T")


def patiently(name: str, request: Callable[[], T], on_retry: Callable[[], None] = lambda: None) -> T:
    """What `request` returns, made again while its error may pass; `name` tells people what is waited for."""
    began, pause = time.monotonic(), _PAUSES[0]
    while True:
        try:
            return request()
        except Exception as error:
            wait = pause * random.uniform(0.5, 1.5)  # ranks that failed together do not come back together
            if not _may_pass(error) or time.monotonic() - began + wait > PATIENCE:
                raise
            logging.getLogger(__name__).warning("%s: %s; trying again in %.1f s", name, error, wait)
        on_retry()
        time.sleep(wait)
        pause = min(2 * pause, _PAUSES[1])


def _may_pass(error: Exception) -> bool:
    if isinstance(error, OSError) and not isinstance(error, _LASTING):
        return error.errno != errno.ENOSPC
    return any(kind.__name__ in _PASSING for kind in type(error).__mro__)
