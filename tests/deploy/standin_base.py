"""A stand-in for the base image where its registry cannot be reached: Debian, and the Python that runs these tests."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tests.deploy.tools import call

# what CPython's extension modules are linked with
_LIBRARIES = (
    "ca-certificates libbz2-1.0 libexpat1 libffi8 liblzma5 libncursesw6 libreadline8 libsqlite3-0 libssl3 libuuid1 "
    "netbase tzdata zlib1g"
)
_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def make_root(root: Path, suite: str) -> None:
    """Make the files of the image.

    Args:
        root: where they are made.
        suite: Debian's release, such as "bookworm".
    """
    call("debootstrap", "--variant=minbase", f"--include={_LIBRARIES.replace(' ', ',')}", suite, root, deadline_s=900)
    prefix, local = Path(sys.base_prefix), root / "usr/local"
    name = f"python{_VERSION}"
    shutil.copytree(
        prefix / "lib" / name,
        local / "lib" / name,
        ignore=shutil.ignore_patterns("site-packages", "test", "__pycache__", "*.a"),
        symlinks=True,
    )
    (local / "lib" / name / "site-packages").mkdir()
    shutil.copytree(prefix / "include" / name, local / "include" / name)
    for library in (prefix / "lib").glob("libpython*.so*"):
        shutil.copy2(library, local / "lib", follow_symlinks=False)
    shutil.copy2(prefix / "bin" / name, local / "bin")
    call("chroot", root, "ldconfig")
    call("chroot", root, f"/usr/local/bin/{name}", "-m", "ensurepip")
    for link, target in {"python": name, "python3": name, "pip": f"pip{_VERSION}"}.items():
        (local / "bin" / link).symlink_to(target)
    (local / "bin/pip3").unlink(missing_ok=True)
