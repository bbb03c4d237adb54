"""A cluster of several nodes on one machine, for tests and laptops, with token authentication and on loopback alone.

    python -m cluster.local --nodes 3

It prints how to reach it, takes `add KIND [PYTHON]` and `remove NAME` from its standard input, and ends when that is
closed. Its nodes are of the kinds of `ray-cluster.yaml`, with the same labels; they have no GPUs. `LocalCluster` is the
same for a program.

With `--isolated` every node lives in a network namespace of its own, and `cut NAME` and `mend NAME` take a node's link
away and give it back. That wants root; see `cluster.netns`.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import Field

from cluster.netns import Bridge
from cluster.start import require_token
from zsr.cluster import session_folders
from zsr.commands.base import JobConfig, explain, parse
from zsr.errors import ConfigError
from zsr.interrupt import WATCH
from zsr.process import LOOPBACK

ROOT: Final = Path(__file__).resolve().parents[1]
NODE_TYPES: Final = ROOT / "ray-cluster.yaml"
Kind = Literal["cpu", "gpu", "gpu-spot"]
Reply = dict[str, Any]


class Config(JobConfig):
    """Flags of cluster.local.

    Attributes:
        nodes: how many, the head included.
        kinds: of the nodes after the head, in turn.
        cpus: what a worker node offers.
        head_cpus: what the head offers; that of a real cluster offers none.
        dashboard_port: on loopback; 0 takes a free one.
        object_store_mib: shared memory of a node.
        isolated: every node in a network namespace of its own.
    """

    nodes: int = Field(3, ge=1)
    kinds: tuple[Kind, ...] = ("cpu", "gpu-spot")
    cpus: int = Field(2, ge=1)
    head_cpus: int = Field(0, ge=0)
    dashboard_port: int = 8265
    object_store_mib: int = Field(200, ge=80)
    isolated: bool = False

    def workers(self) -> tuple[Kind, ...]:
        """The kinds of the nodes after the head."""
        return tuple(self.kinds[number % len(self.kinds)] for number in range(self.nodes - 1))


def node_labels(kind: str) -> dict[str, str]:
    """The labels of a node type of `ray-cluster.yaml`. Raises ConfigError if it has no such type."""
    types = yaml.safe_load(NODE_TYPES.read_text())["available_node_types"]
    if kind not in types:
        raise ConfigError(f"no node type {kind!r} in {NODE_TYPES}; it has {sorted(types)}")
    return dict(types[kind]["labels"])


class Nodes:
    """The nodes that this process has started, by name. Its environment must hold a token.

    Args:
        spilled: folder for objects that memory has no room for.
    """

    def __init__(self, config: Config, spilled: str) -> None:
        from ray.cluster_utils import Cluster  # reads the environment that `serve` sets

        self.config = config
        self.spilled = spilled
        self.bridge = Bridge() if config.isolated else None
        head = {
            **self._about("head", config.head_cpus),
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": config.dashboard_port,
            "dashboard_agent_listen_port": 0,
        }
        self.cluster = Cluster(initialize_head=True, shutdown_at_exit=True, head_node_args=head)
        self.workers: dict[str, Any] = {}
        WATCH.at_end(self._leave)
        self.started = 0
        for kind in config.workers():
            self.add(kind)

    def _about(self, kind: str, cpus: int) -> dict[str, Any]:
        return {
            "num_cpus": cpus,
            "labels": node_labels(kind),
            "object_store_memory": self.config.object_store_mib << 20,
            "object_spilling_directory": self.spilled,
            "node_ip_address": "127.0.0.1" if self.bridge is None else self.bridge.address,
        }

    def add(self, kind: str, python: str = sys.executable) -> Reply:
        """Start a node of that kind, whose processes run on the interpreter `python`; its name."""
        about = self._about(kind, self.config.cpus)
        self.started += 1
        name = f"{kind}-{self.started}"
        with self._joined(name) as address, interpreter(python):
            self.workers[name] = self.cluster.add_node(**about | {"node_ip_address": address})
        return {"added": name, "id": self.workers[name].node_id}

    @contextmanager
    def _joined(self, name: str) -> Iterator[str]:
        """Where node `name` starts; its address."""
        if self.bridge is None:
            yield "127.0.0.1"
            return
        with self.bridge.joined(name) as address:
            yield address

    def remove(self, name: str) -> Reply:
        """End a node at once, as a spot machine is taken away."""
        self.cluster.remove_node(self._worker(name), allow_graceful=False)
        del self.workers[name]
        if self.bridge is not None:
            self.bridge.leave(name)
        return {"removed": name}

    def cut(self, name: str) -> Reply:
        """Take the node's link down."""
        self._worker(name)
        self._bridge().link(name, "down")
        return {"cut": name}

    def mend(self, name: str) -> Reply:
        """Bring the node's link up again."""
        self._worker(name)
        self._bridge().link(name, "up")
        return {"mended": name}

    def _worker(self, name: str) -> Any:
        if name not in self.workers:
            raise ConfigError(f"no node {name!r}; there are {sorted(self.workers)}")
        return self.workers[name]

    def _bridge(self) -> Bridge:
        if self.bridge is None:
            raise ConfigError("links can be cut with --isolated only")
        return self.bridge

    def about(self) -> Reply:
        """How to reach the cluster."""
        return {
            "address": self.cluster.address,
            "dashboard": f"http://{self.cluster.webui_url}",
            "nodes": ["head", *self.workers],
            "ids": {name: node.node_id for name, node in self.workers.items()},
            "pid": os.getpid(),
        }

    def obey(self, line: str) -> Reply:
        """Do what a line of standard input says."""
        commands: dict[str, Callable[[str], Reply]] = {
            "add": self.add,
            "remove": self.remove,
            "cut": self.cut,
            "mend": self.mend,
        }
        match line.split():
            case ["add", kind, python]:
                return self.add(kind, python)
            case [verb, name] if verb in commands:
                return commands[verb](name)
            case _:
                raise ConfigError(f"{line.strip()!r}: expected one of {sorted(commands)} and a kind or name")

    def stop(self) -> None:
        """End every node."""
        self.cluster.shutdown()  # type: ignore[no-untyped-call]
        self._leave()

    def _leave(self) -> None:
        for name in self.workers if self.bridge is not None else ():
            self._bridge().leave(name)


@contextmanager
def interpreter(python: str) -> Iterator[None]:
    """Let Ray start processes with `python`: on a real cluster, machines may be set up differently."""
    before, sys.executable = sys.executable, python
    try:
        yield
    finally:
        sys.executable = before


def serve(argv: Sequence[str]) -> int:
    """The command: start the nodes and obey standard input until it ends; 2 when refused."""
    try:
        config = parse(Config, argv, "python -m cluster.local")
        require_token(os.environ)
        if config.dry_run:
            return _say({kind: node_labels(kind) for kind in ("head", *config.workers())})
        if not config.isolated:
            os.environ |= LOOPBACK
        # jobs are submitted as `python -m ...`, and this environment's python is meant
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        WATCH.advice = "its nodes have ended"
        with session_folders() as (folder, spilled):
            os.environ["RAY_TMPDIR"] = folder
            _run(Nodes(config, spilled))
    except SystemExit:  # after --help
        raise
    except BaseException as error:  # the command's boundary
        WATCH.hold()
        code, message = explain(error)
        print(f"error: {message}", file=sys.stderr)
        _say({"error": message, "exit_code": code})
        return code
    return 0


def _run(nodes: Nodes) -> None:
    try:
        _say(nodes.about())
        for line in sys.stdin:
            try:
                _say(nodes.obey(line))
            except ConfigError as error:
                _say({"error": str(error)})
    finally:
        nodes.stop()


def _say(reply: Mapping[str, Any]) -> int:
    print(json.dumps(reply), flush=True)
    return 0


@dataclass
class LocalCluster:
    """A running local cluster, for a program; `local_cluster` makes one.

    Attributes:
        environment: of clients that may use it.
        about: its address, dashboard, and the names of its first nodes.
    """

    process: subprocess.Popen[str]
    environment: dict[str, str]
    about: Reply = field(default_factory=dict)

    def ask(self, line: str) -> Reply:
        """Send a command; its reply. Raises ConfigError where it was refused or the cluster has ended."""
        if self.process.stdin is None or self.process.stdout is None:
            raise ConfigError("the local cluster was started without pipes")
        if line:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise ConfigError(f"the local cluster ended with status {self.process.wait()}; see its messages above")
        reply: Reply = json.loads(answer)
        if "error" in reply:
            raise ConfigError(str(reply["error"]))
        return reply

    def add(self, kind: Kind, python: str = sys.executable) -> str:
        """Add a node, whose processes run on the interpreter `python`; its name."""
        return str(self.ask(f"add {kind} {python}")["added"])

    def remove(self, name: str) -> None:
        """End a node at once."""
        self.ask(f"remove {name}")

    def inside(self, command: Sequence[str]) -> list[str]:
        """`command` as a client of an isolated cluster runs it: in the head's network namespace."""
        return ["nsenter", f"--net=/proc/{self.about['pid']}/ns/net", *command]


@contextmanager
def local_cluster(token: Path, **flags: Any) -> Iterator[LocalCluster]:
    """A local cluster that ends with the block.

    Args:
        token: its token file, of mode 0600.
        flags: those of `Config`.

    Raises:
        ConfigError: refused, or not started; the message says why.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    words = list(_words({"dashboard_port": 0, **flags}))
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.local", *words],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # an interrupt of the terminal is for the client to handle
    )
    running = LocalCluster(process, environment)
    try:
        running.about = running.ask("")
        running.environment |= {"RAY_API_SERVER_ADDRESS": running.about["dashboard"]}
        running.environment |= {} if flags.get("isolated") else LOOPBACK
        yield running
    finally:
        _end(process)


def _words(flags: Mapping[str, Any]) -> Iterator[str]:
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from (f"--{flag}", *map(str, value))
        else:
            yield from (f"--{flag}", str(value))


def _end(process: subprocess.Popen[str]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:]))
