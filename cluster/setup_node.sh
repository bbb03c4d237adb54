#!/usr/bin/env bash
# What every node runs before it starts Ray, also in a container: bash setup_node.sh [SHARED]
# It changes nothing but limits and the token file's mode. It checks what a job would trip over later, and says what to fix.
set -euo pipefail

shared="${1:-}"
failed=0

complain() {
    echo "setup_node: $1" >&2
    failed=1
}

# Ray keeps a descriptor a connection, and every worker talks to every node
if ! ulimit -n 65536 2>/dev/null && [ "$(ulimit -n)" -lt 65536 ]; then
    complain "at most $(ulimit -n) open files; raise the limit to 65536 (docker: --ulimit nofile=65536:65536)"
fi

token="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
if [ -f "$token" ]; then
    chmod 600 "$token"
elif [ -z "${RAY_AUTH_TOKEN:-}" ]; then # Kubernetes hands the token over in the environment
    complain "no token file $token; write it once with '(umask 077; ray get-auth-token --generate)', copy it to all nodes"
fi
if [ "${RAY_AUTH_MODE:-}" != token ]; then
    complain "RAY_AUTH_MODE is '${RAY_AUTH_MODE:-}', expected 'token'"
fi

# the object store lives there; in less, Ray falls back to a disk and every transfer crawls
shm_mib=$(df --output=size -BM /dev/shm | tail -n 1 | tr -dc 0-9)
if [ "$shm_mib" -lt 1024 ]; then
    complain "/dev/shm has $shm_mib MiB; the object store wants 30% of the memory (docker: --shm-size)"
fi
tmp_gib=$(df --output=avail -BG /tmp | tail -n 1 | tr -dc 0-9)
if [ "$tmp_gib" -lt 10 ]; then
    complain "/tmp has $tmp_gib GiB free; Ray spills objects and keeps logs there, 10 GiB at the least"
fi

# artifacts are published with a hard link that fails if the name exists: a file system without it would lose versions
if [ -n "$shared" ]; then
    probe="$shared/.zsr-probe-$(hostname)-$$"
    if ! touch "$probe" 2>/dev/null; then
        complain "$shared cannot be written; is it mounted on this node, and into the container?"
    else
        ln "$probe" "$probe.link" 2>/dev/null || complain "$shared has no hard links; publishing wants them"
        if ln "$probe" "$probe.link" 2>/dev/null; then
            complain "$shared lets a link replace a file; publishing wants it refused"
        fi
        rm -f "$probe" "$probe.link"
    fi
fi

if command -v nvidia-smi >/dev/null && ! nvidia-smi --list-gpus | grep -q GPU; then
    complain "nvidia-smi lists no GPU; install the driver, or take the CPU image"
fi

# the client of artifacts in buckets
if ! python -c 'import s3fs' 2>/dev/null; then
    if [ -z "$shared" ]; then
        complain "no shared folder was named and s3fs is not installed; install zsr[cluster], or name the folder"
    else
        echo "setup_node: s3fs is not installed; artifacts can be in $shared, and not in a bucket"
    fi
fi

[ "$failed" = 0 ] || exit 1
python - <<'PYTHON' || complain "the environment is not whole; build the image from cluster/Dockerfile"
import sys
from importlib.metadata import version

import deepspeed, faiss, ray, torch  # noqa: E401, F401

print("setup_node: python", sys.version.split()[0], *(f"{p} {version(p)}" for p in ("zsr", "ray", "torch", "deepspeed")))
print("setup_node: GPUs seen by torch", torch.cuda.device_count())
PYTHON

exit "$failed"
