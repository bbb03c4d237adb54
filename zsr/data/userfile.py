"""Small text files that the user writes: class lists, splits, tables of names."""

from pathlib import Path
from typing import Final

from zsr.errors import ConfigError
from zsr.storage import local_path

UTF16: Final = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: str | Path, what: str) -> str:
    """The UTF-8 text of `path`, without a byte order mark.

    Args:
        what: what the message calls the file, such as the flag that names it.

    Raises:
        ConfigError: it cannot be read, or has another encoding.
    """
    try:
        data = local_path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} {path}: cannot be read: {error.strerror or error}") from error
    if data.startswith(UTF16):
        raise ConfigError(f"{what} {path}: is UTF-16, expected UTF-8; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{what} {path}: line {line} has the byte {data[error.start]:#x}, which is not UTF-8 (Latin-1, perhaps); "
            "save it as UTF-8"
        ) from error
