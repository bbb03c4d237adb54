"""`ray start` for one machine, which refuses to start without token authentication.

    python -m cluster.start head                      # on the head
    python -m cluster.start worker HEAD:6379          # on every other machine

Further words go to `ray start` as they are, such as `--num-cpus 8` or `--labels ray.io/market-type=spot`.
"""

import os
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from zsr.errors import ConfigError, ZsrError

MINIMUM: Final = 32  # characters of a token; `ray get-auth-token --generate` writes more
WRITE: Final = "(umask 077; ray get-auth-token --generate)"  # Ray itself would let others read the file


def token_path(environment: Mapping[str, str]) -> Path:
    """The token file that Ray would read."""
    return Path(environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def require_token(environment: Mapping[str, str]) -> Path:
    """The token file, if a node that starts with this environment will ask everyone for the token.

    Raises:
        ConfigError: authentication is off, the token is in the environment itself (every job would inherit it), or the
            file is missing, a link, readable by others, or too short to be a secret.
    """
    if environment.get("RAY_AUTH_MODE") != "token":
        found = environment.get("RAY_AUTH_MODE")
        raise ConfigError(f"RAY_AUTH_MODE is {found!r}, expected 'token'; set it on every node and on the client")
    if environment.get("RAY_AUTH_TOKEN"):
        raise ConfigError("RAY_AUTH_TOKEN is set, and jobs would inherit it; put the token into a file of mode 0600")
    path = token_path(environment)
    try:
        info = path.lstat()
    except OSError as error:
        raise ConfigError(
            f"token file {path}: {error.strerror}; write one with `{WRITE}` and copy it to all nodes, mode 0600"
        ) from error
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
        raise ConfigError(f"token file {path}: expected a plain file that belongs to the user who starts Ray")
    if mode := stat.S_IMODE(info.st_mode) & 0o077:
        raise ConfigError(f"token file {path}: others may use it (mode {mode:03o}); run `chmod 600 {path}`")
    if len(path.read_bytes().strip()) < MINIMUM:
        raise ConfigError(f"token file {path}: shorter than {MINIMUM} characters; remove it and run `{WRITE}`")
    return path


def command(words: Sequence[str]) -> list[str]:
    """The `ray start` command of `head ...` or `worker HEAD:PORT ...`.

    Raises:
        ConfigError: neither of the two.
    """
    match list(words):
        case ["head", *more]:
            where = ["--head", "--port=6379", "--dashboard-host=127.0.0.1", "--dashboard-port=8265"]
        case ["worker", address, *more] if not address.startswith("-"):
            where = [f"--address={address}"]
        case _:
            raise ConfigError(f"expected `head ...` or `worker HEAD:PORT ...`; found {list(words)[:2]}")
    return [str(Path(sys.executable).parent / "ray"), "start", *where, "--disable-usage-stats", *more]


def main(argv: Sequence[str] | None = None) -> int:
    """Check, then become `ray start`; 2 when refused."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(f"{__doc__}\n`ray start --help` lists those words.")
        return 0 if words else 2
    try:
        start = command(words)
        require_token(os.environ)
    except ZsrError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    os.execv(start[0], start)


if __name__ == "__main__":
    sys.exit(main())
