"""Network namespaces for a local cluster: every node has an address and a link of its own, on this machine alone.

The calling process moves into a new namespace with a bridge, where the head runs. A node hangs on the bridge
by a pair of virtual links. Nothing of it can be reached from the machine's own network.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from zsr.errors import ConfigError

CLONE_NEWNET: Final = 0x40000000
NETWORK: Final = "10.77.0"  # private, and seen from inside only


def _system(function: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise ConfigError(
            f"--isolated: {function}: {reason}; network namespaces want root (CAP_NET_ADMIN, CAP_SYS_ADMIN)"
        )


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"--isolated: ip {' '.join(words)}: {done.stderr.strip()}")


class Bridge:
    """A new network namespace for this process, with a bridge.

    Raises:
        ConfigError: the machine allows no network namespaces, or has no `ip`.
    """

    address: Final = f"{NETWORK}.1"

    def __init__(self) -> None:
        _system("unshare", CLONE_NEWNET)
        _ip("link", "set", "lo", "up")
        _ip("link", "add", "zsr", "type", "bridge")
        _ip("address", "add", f"{self.address}/24", "dev", "zsr")
        _ip("link", "set", "zsr", "up")
        _ip("route", "add", "default", "dev", "zsr")  # Ray asks which address faces the world
        self.numbers: dict[str, int] = {}

    def _space(self, name: str) -> str:
        return f"zsr-{os.getpid()}-{self.numbers[name]}"

    @contextmanager
    def joined(self, name: str) -> Iterator[str]:
        """Make a namespace on the bridge and be in it within the block; what starts there stays there. Its address."""
        number = self.numbers[name] = len(self.numbers) + 2
        space, address = self._space(name), f"{NETWORK}.{number}"
        _ip("netns", "add", space)
        _ip("link", "add", f"out{number}", "type", "veth", "peer", "name", "in", "netns", space)
        _ip("link", "set", f"out{number}", "master", "zsr", "up")
        for words in (
            ("link", "set", "lo", "up"),
            ("address", "add", f"{address}/24", "dev", "in"),
            ("link", "set", "in", "up"),
            ("route", "add", "default", "via", self.address),
        ):
            _ip("-n", space, *words)
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _enter(Path("/run/netns") / space)
            yield address
        finally:
            _system("setns", own, CLONE_NEWNET)
            os.close(own)

    def link(self, name: str, state: str) -> None:
        """Set a node's link "up" or "down"."""
        _ip("link", "set", f"out{self.numbers[name]}", state)

    def leave(self, name: str) -> None:
        """Remove a node's namespace and its link."""
        _ip("netns", "delete", self._space(name))


def _enter(space: Path) -> None:
    descriptor = os.open(space, os.O_RDONLY)
    try:
        _system("setns", descriptor, CLONE_NEWNET)
    finally:
        os.close(descriptor)
