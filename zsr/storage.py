"""Where bytes lie: local folders, and object stores through fsspec (`s3://bucket/prefix`, with the extra `s3`).

Every path that a user gives, for input or output, goes through here: `~`, `file:` and paths relative to the folder in
which the command was called are resolved once, where the command reads its flags (`located`), and a URL stays a URL.

Credentials, region and endpoint are those that the storage's own client finds (for S3: the AWS_* variables, its
configuration files, or the role of the machine); none is ever a flag or part of an artifact.
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
    scheme = re.match(r"^([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?=[^/])", text)
    if scheme is None or scheme[1].lower() == "file":
        return None
    return f"{scheme[1].lower()}://{text[scheme.end() :]}".rstrip("/")


def local_path(place: str | Path) -> Path:
    """`place`, a path, `~/path` or file: URL, as an absolute path.

    Raises:
        ConfigError: a home directory that nobody has.
    """
    text = str(place)
    if text[:5].lower() == "file:":
        text = _path_of(text[5:])
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"{place}: {error}; give a full path") from error


def _path_of(rest: str) -> str:
    """The path of a file: URL, of which `rest` follows the colon. `Path` has made one slash of two or three, so that
    `localhost` is told by its name alone.
    """
    path = unquote(rest)
    return re.sub(r"^/{2,}", "/", re.sub(r"^/{1,2}localhost(?=/)", "", path))


def located(value: Any) -> Any:
    """`value` of a flag with every path in it resolved: absolute, or a URL. Other values stay as they are."""
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
    """The bytes of a file: settings, a list, an image; at most `cap` of them.

    Raises:
        OSError: as `open` does, for a path and for a URL alike. StorageError: the store cannot be reached.
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
    """The text of a file of settings, UTF-8 with or without a byte order mark.

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
    """Whether a file, and no folder, is at `place`. Raises StorageError, ConfigError as `read_file`."""
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
    """The fsspec file system of `url` and the path in it, without a slash at the end.

    Listings are not cached: another process writes while this one reads, and a cache would grow with what is listed.

    Raises:
        ConfigError: an unknown scheme, or its client is not installed.
    """
    import fsspec  # here: a run on local paths does without it

    try:
        found, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError, OSError) as error:  # some clients look for libraries when they are made
        said = str(error).partition("\n")[0][:300]
        raise ConfigError(
            f"{url}: {said}; a path, file:// and s3:// are known here (for s3:// install the extra: "
            "pip install 'zsr[s3]'), others where their client is installed"
        ) from error
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
