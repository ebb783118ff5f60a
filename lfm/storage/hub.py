"""Files of the Hugging Face Hub, hf://USER/REPO[@REVISION]/NAME: read through huggingface_hub and its cache.

A file is downloaded once for each revision, and read without a network after that (HF_HUB_OFFLINE=1). Only the named file is
downloaded, and nothing of a repository is executed.
"""

from __future__ import annotations

import re
from pathlib import Path

from lfm.errors import StorageError, on_one_line

PROTOCOL = "hf://"
_URL = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<name>.+))?")


def is_on_hub(path: str) -> bool:
    """Return whether `path` is a URL of the Hub."""
    return path.startswith(PROTOCOL)


def cached_file(url: str) -> Path | None:
    """Return the local copy of a file, downloaded if it is not in the cache; None if the repository has no such file.

    Raises:
        StorageError: there is no such repository or revision, it may not be read, or the Hub cannot be reached.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise StorageError(f"{url}: must be hf://USER/REPO, with @REVISION after REPO if it is not the newest")
    if match["name"] is None:
        return None
    from huggingface_hub import errors, hf_hub_download

    repository = f"{PROTOCOL}{match['repo']}"
    try:
        return Path(hf_hub_download(match["repo"], match["name"], revision=match["revision"]))
    except errors.LocalEntryNotFoundError as error:
        raise StorageError(
            f"{url}: is not in the cache, and the Hub cannot be reached ({on_one_line(error)}); check the network"
        ) from error
    except errors.EntryNotFoundError:
        return None
    except errors.RevisionNotFoundError as error:
        raise StorageError(f"{repository}: has no revision {match['revision']}; leave it out for the newest") from error
    except errors.RepositoryNotFoundError as error:
        raise StorageError(
            f"{repository}: no such repository, or a private or gated one; check its name, and sign in with `hf auth login`"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise StorageError(f"{url}: {on_one_line(error)}") from error
