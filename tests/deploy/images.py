"""Builds the images with buildah, in a storage of the project's own, and runs commands in them with podman."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from tests.deploy.standin_base import make_root
from tests.deploy.tools import ROOT, WORK, call
from tests.unit.deploy.dockerfiles import DOCKERFILES, tag_of

STORAGE = ["--root", f"{WORK}/storage", "--runroot", f"{WORK}/run", "--storage-driver", "overlay"]


def build(device: str, deadline_s: float) -> str:
    """Build an image, and return its name. Layers that did not change are kept."""
    dockerfile = DOCKERFILES[device]
    found = re.search(r"^FROM (\S+)$", dockerfile.read_text(), re.MULTILINE)
    assert found
    _provide(f"docker.io/library/{found[1]}")
    # HEALTHCHECK is a field of Docker's format only
    options = ["--isolation", "chroot", "--layers", "--pull-never", "--format", "docker", *_settings_of_pip()]
    call(
        "buildah", *STORAGE, "build", *options, "--file", dockerfile, "--tag", tag_of(device), ROOT,
        deadline_s=deadline_s,
    )  # fmt: skip
    return tag_of(device)


def _provide(base: str) -> None:
    """Pull the base image, or make a stand-in if its registry does not answer."""
    if _buildah_does("inspect", "--type", "image", base) or _buildah_does("pull", base):
        return
    print(f"stand-in for {base}")
    root = WORK / "base"
    shutil.rmtree(root, ignore_errors=True)
    make_root(root, base.rpartition("-")[2])
    container = call("buildah", *STORAGE, "from", "scratch").split()[-1]
    call("buildah", *STORAGE, "add", container, root, "/", deadline_s=300)
    call("buildah", *STORAGE, "commit", "--format", "docker", container, base, deadline_s=300)
    call("buildah", *STORAGE, "rm", container)
    shutil.rmtree(root)


def _buildah_does(*command: str) -> bool:
    return subprocess.run(["buildah", *STORAGE, *command], capture_output=True, timeout=900).returncode == 0


def _settings_of_pip() -> list[str]:
    """Mount this machine's settings of pip, and the folders that they name, into the build: it may need a mirror."""
    shown = call(sys.executable, "-m", "pip", "config", "debug")
    files = {Path(path) for path in re.findall(r"^\s*(/\S+), exists: True$", shown, re.MULTILINE)}
    named = {Path(path) for file in files for path in re.findall(r"(?:file://)?(/[\w./-]+)", file.read_text())}
    # a source of file:///a/simple has its files beside it
    folders = {path.parent if path.name == "simple" else path for path in named if path.exists()}
    return [part for path in sorted(files | folders) for part in ("--volume", f"{path}:{path}:ro")]


def podman_command(*command: str | Path) -> list[str]:
    """The command line of podman, which needs cgroups of version 2 alone; on other machines it gets a mount of them."""
    call_ = ["podman", *STORAGE, *map(str, command)]
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        return call_
    return ["unshare", "--mount", "sh", "-c", 'mount -t cgroup2 none /sys/fs/cgroup && exec "$@"', "sh", *call_]


def podman(*command: str | Path, deadline_s: float = 120) -> str:
    environment = os.environ | {"DISABLE_HC_SYSTEMD": "true"}  # nothing but the tests calls health checks
    return call(*podman_command(*command), deadline_s=deadline_s, env=environment)


def limits() -> list[str]:
    """Options that ask for no more than this process has: podman's own limits may be higher."""
    files, processes = resource.getrlimit(resource.RLIMIT_NOFILE)[1], 2**14
    return [
        "--cgroups",
        "disabled",
        "--ulimit",
        f"nofile={files}:{files}",
        "--ulimit",
        f"nproc={processes}:{processes}",
    ]


def run(image: str, *command: str, options: tuple[str, ...] = (), deadline_s: float = 120) -> str:
    """Run a command in a container of its own without a network, as the image's user, and return its output."""
    return podman("run", "--rm", "--network", "none", *limits(), *options, image, *command, deadline_s=deadline_s)
