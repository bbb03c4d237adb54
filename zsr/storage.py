"""Access to local folders, and to object stores through fsspec (`s3://bucket/prefix`, with the extra `s3`).

Every path that a user gives, for input or output, is resolved here: `~`, `file:` and paths relative to the current
directory once, when the command parses its flags (`located`); URLs are kept.

Credentials, region and endpoint are found by the client of the storage (for S3: the AWS_* variables, its configuration
files, or the role of the machine); they are never flags or part of an artifact.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from pydantic import BaseModel

from zsr.errors import ConfigError, StorageError

CLIENTS: Final = frozenset({"aiobotocore", "botocore", "aiohttp", "fsspec", "s3fs"})

# location of object store and cache; no secrets, since the environment of tasks is visible
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
    """`place` as a URL without a trailing slash; None for a path, which includes file:// URLs.

    `Path("s3://bucket/x")` becomes s3:/bucket/x: the lost slash is restored.
    """
    text = str(place)
    scheme = re.match(r"^([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?=[^/])", text)
    if scheme is None or scheme[1].lower() == "file":
        return None
    return f"{scheme[1].lower()}://{text[scheme.end() :]}".rstrip("/")


def local_path(place: str | Path) -> Path:
    """`place`, a path, `~/path` or file: URL, as an absolute path.

    Raises:
        ConfigError: the home directory of an unknown user.
    """
    text = str(place)
    if text[:5].lower() == "file:":
        text = _path_of(text[5:])
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"{place}: {error}; give a full path") from error


def _path_of(rest: str) -> str:
    """The path of a file: URL, given what follows the colon. `Path` may have merged slashes, so the host `localhost` is
    recognized only by its name.
    """
    path = unquote(rest)
    return re.sub(r"^/{2,}", "/", re.sub(r"^/{1,2}localhost(?=/)", "", path))


def located(value: Any) -> Any:
    """The value of a flag with every path in it made absolute; URLs and other values are unchanged."""
    if isinstance(value, Path):
        return value if url_of(value) else local_path(value)
    if isinstance(value, tuple):
        return tuple(located(each) for each in value)
    if isinstance(value, Mapping):
        return {name: located(each) for name, each in value.items()}
    if isinstance(value, BaseModel):
        found = {name: located(getattr(value, name)) for name in type(value).model_fields}
        return value.model_copy(update=found)
    return value


def read_file(place: str | Path, cap: int | None = None) -> bytes:
    """Read a file, at most `cap` bytes.

    Raises:
        OSError: as `open` does, for both paths and URLs. StorageError: the store cannot be reached.
        ConfigError: see `local_path` and `filesystem`.
    """
    url = url_of(place)
    if url is None:
        with local_path(place).open("rb") as handle:
            return handle.read(-1 if cap is None else cap)
    store, path = filesystem(url)
    with remote_errors(url):
        data: bytes = store.cat_file(path, end=cap)
    return data


def read_text(place: str | Path, what: str) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Args:
        what: the flag or variable that names the file, for messages.

    Raises:
        ConfigError: missing, not readable, or in another encoding. StorageError: the store cannot be reached.
    """
    try:
        return read_file(place).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{what} {place}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{what} {place}: line {line} is not UTF-8; save the file as UTF-8, for example with "
            "`iconv -f LATIN1 -t UTF-8`"
        ) from error


def is_file(place: str | Path) -> bool:
    """Whether `place` is a file, not a folder. Raises StorageError, ConfigError as `read_file`."""
    url = url_of(place)
    if url is None:
        return local_path(place).is_file()
    store, path = filesystem(url)
    with remote_errors(url):
        return bool(store.isfile(path))


def files_below(place: str | Path) -> list[Path]:
    """Files in the folder `place` and below, in name order; none if there is no such folder.

    Raises:
        StorageError, ConfigError: as `read_file`.
    """
    url = url_of(place)
    if url is None:
        return sorted(path for path in local_path(place).rglob("*") if path.is_file())
    store, base = filesystem(url)
    with remote_errors(url):
        return sorted(Path(f"{url}/{name[len(base) + 1 :]}") for name in store.find(base) if len(name) > len(base))


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path in it, without a trailing slash.

    Listings are not cached: other processes write at the same time, and a cache would grow with every listing.

    Raises:
        ConfigError: an unknown scheme, or its client is not installed.
    """
    import fsspec  # imported here: not needed for local paths

    try:
        found, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError, OSError) as error:  # some clients load libraries when they are constructed
        said = str(error).partition("\n")[0][:300]
        raise ConfigError(
            f"{url}: {said}; supported are paths, file:// and s3:// (for s3:// install the extra: "
            "pip install 'zsr[s3]'), and others if their fsspec client is installed"
        ) from error
    return found, str(path).rstrip("/")


@contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Turn errors of a store's client into StorageError, except FileNotFoundError and FileExistsError."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, StorageError):
        raise
    except Exception as error:
        # some errors of botocore are not OSErrors, such as missing credentials or an unknown endpoint
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in CLIENTS:
            raise
        raise StorageError(f"{url}: {type(error).__name__}: {error}; check credentials and endpoint") from error


def shared_environment() -> dict[str, str]:
    """Environment variables of this process that tasks on other nodes need to find the object store and the cache."""
    return {name: os.environ[name] for name in SHARED if name in os.environ}
