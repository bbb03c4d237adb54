"""Where bytes lie: local folders, and object stores through fsspec (`s3://bucket/prefix`, with the extra `s3`).

Credentials, region and endpoint are those that the storage's own client finds (for S3: the AWS_* variables, its
configuration files, or the role of the machine); none is ever a flag or part of an artifact.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from zsr.errors import ConfigError, StorageError

CLIENTS: Final = frozenset({"aiobotocore", "botocore", "aiohttp", "fsspec", "s3fs"})

# where an object store and the cache are; nothing secret, so it may stand in a task's environment for all to see
SHARED: Final = (
    "AWS_CONFIG_FILE",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_SHARED_CREDENTIALS_FILE",
    "ZSR_CACHE",
    "ZSR_CACHE_BYTES",
)


def url_of(place: str | Path) -> str | None:
    """The URL that `place` is, without a slash at its end; None for a path, and file:// is one.

    `Path("s3://bucket/x")` is spelt s3:/bucket/x: the slash that it lost is put back.
    """
    text = str(place)
    scheme = re.match(r"^([a-z][a-z0-9+.-]+):/{1,2}(?=[^/])", text)
    if scheme is None or scheme[1] == "file":
        return None
    return f"{scheme[1]}://{text[scheme.end() :]}".rstrip("/")


def local_path(place: str | Path) -> Path:
    """`place`, which is no URL but for file://, as an absolute path."""
    return Path(re.sub(r"^file:(//)?", "", str(place))).absolute()


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path in it, without a slash at the end.

    Listings are not cached: another process writes while this one reads, and a cache would grow with what is listed.

    Raises:
        ConfigError: an unknown scheme, or its client is not installed.
    """
    import fsspec  # here: a run on local paths does without it

    try:
        found, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{url}: {error}; for s3:// install the extra: pip install 'zsr[s3]'") from error
    return found, str(path).rstrip("/")


@contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Turn what a store's client raises into StorageError; FileNotFoundError and FileExistsError pass."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, StorageError):
        raise
    except Exception as error:
        # botocore's own errors are no OSErrors: no credentials, no such endpoint
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in CLIENTS:
            raise
        raise StorageError(f"{url}: {type(error).__name__}: {error}; check credentials and endpoint") from error


def shared_environment() -> dict[str, str]:
    """What tasks on other nodes need to find the same object store and cache, as this process has it."""
    return {name: os.environ[name] for name in SHARED if name in os.environ}
