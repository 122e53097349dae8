"""The sandbox, with real bubblewrap and hostile programs."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quatro_ray.config.rewards import SandboxLimits
from quatro_ray.errors import SandboxError
from quatro_ray.isolation import bubblewrap
from quatro_ray.isolation.bubblewrap import sandbox_command, sandboxed
from quatro_ray.isolation.run_program import Finished, run
from quatro_ray.isolation.seccomp import seccomp_filter
from quatro_ray.isolation.self_test import self_test
from tests.make import needs_sandbox
from tests.unit.hostile_programs import ATTACKS, PRELUDE

pytestmark = [pytest.mark.process, needs_sandbox]

LIMITS = SandboxLimits(cpu_s=1, wall_s=2, memory_mib=128, max_processes=16, output_kib=64)
PATIENT = LIMITS.model_copy(update={"wall_s": 60, "cpu_s": 20})
"""For programs that end by themselves, on a machine that may be slow."""
WATCHED = ("/", "/etc", "/root", "/home", "/usr", "/usr/bin", "/var", "/var/tmp", "/dev", "/dev/shm", "/run")
PROJECT = Path(__file__).parents[3]


def python(code: str, *arguments: str, stdin: bytes = b"", limits: SandboxLimits = LIMITS) -> Finished:
    command = [sys.executable, "-I", "/box/program.py", *arguments]
    return run(command, limits, stdin=stdin, files={"program.py": code})


def attacked(code: str, marker: str) -> Finished:
    """Run an attack; once more, with patience, where the sandbox did not start in time."""
    try:
        return python(code, marker)
    except SandboxError as error:
        if "too busy" not in str(error):
            raise
        return python(code, marker, limits=LIMITS.model_copy(update={"wall_s": 30}))


def hostile_files() -> list[Path]:
    """What the attacks would have made; other programs change these folders too, so no listing is compared."""
    folders = [*map(Path, WATCHED), PROJECT, Path(sys.prefix), Path(sys.base_prefix)]
    return [path for folder in folders if os.access(folder, os.R_OK) for path in folder.glob("hostile*")]


@pytest.fixture(autouse=True)
def patient_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = SandboxLimits(cpu_s=20, wall_s=60, memory_mib=128, max_processes=8, output_kib=64)
    monkeypatch.setattr("quatro_ray.isolation.self_test._LIMITS", limits)


def changed_at() -> dict[str, float]:
    """Of the files that attacks try to write or whose modes they try to change."""
    paths = ("/etc/passwd", "/usr/bin/python3", "/usr/bin/env", os.__file__)
    return {path: os.stat(path).st_ctime for path in paths if os.path.exists(path)}


def marked(marker: str) -> list[str]:
    """Command lines of the processes on this machine that have the marker."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            text = Path(f"/proc/{entry}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += [f"{entry}: {text!r}"] if marker.encode() in text else []
    return found


@dataclass
class Aftermath:
    ended: Finished
    seconds: float
    left: list[str]
    good: Finished


@dataclass
class Targets:
    """What is to be left alone: a folder, servers on it and on loopback, and a process."""

    folder: Path
    port: int
    process: int
    marker: str

    def attack(self, name: str) -> Aftermath:
        marker = f"{self.marker}-{name}-"
        values = {"CANARY_VARIABLE": "CANARY_VARIABLE", "CANARY": str(self.folder / "canary"), "PORT": str(self.port)}
        values |= {"PROJECT": str(PROJECT), "PID": str(self.process), "MARKER": marker}
        code = ATTACKS[name]
        for word in ("CANARY.sock", "CANARY", "PORT", "PROJECT", "PID", "MARKER"):
            if word != "CANARY" or "CANARY_VARIABLE" not in code:
                code = code.replace(word, values.get(word, str(self.folder / "socket")))
        start = time.monotonic()
        ended = attacked(PRELUDE + code, marker)
        seconds = time.monotonic() - start
        return Aftermath(ended, seconds, marked(marker), python("print(6 * 7)", limits=PATIENT))


@pytest.fixture(scope="module")
def aftermath() -> Iterator[dict[str, Aftermath]]:
    """All attacks, three at a time; afterwards nothing outside has changed."""
    os.environ["CANARY_VARIABLE"] = "secret"
    marker = f"quatro-{secrets.token_hex(6)}"
    with (
        tempfile.TemporaryDirectory(dir=Path.home() if os.access(Path.home(), os.W_OK) else None) as name,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        subprocess.Popen(["sleep", "600"]) as process,
        ThreadPoolExecutor(3) as threads,
    ):
        folder = Path(name)
        (folder / "canary").write_text("canary")
        unix.bind(str(folder / "socket"))
        unix.listen()
        before = changed_at()
        targets = Targets(folder, tcp.getsockname()[1], process.pid, marker)
        try:
            yield dict(zip(ATTACKS, threads.map(targets.attack, ATTACKS), strict=True))
            assert changed_at() == before
            assert not hostile_files()
            assert (folder / "canary").read_text() == "canary"
            assert sorted(os.listdir(folder)) == ["canary", "socket"]
            assert process.poll() is None
            assert not marked(marker)
        finally:
            process.kill()
    del os.environ["CANARY_VARIABLE"]


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile(name: str, aftermath: dict[str, Aftermath]) -> None:
    after = aftermath[name]
    if name == "write_project" and PROJECT.is_relative_to("/tmp"):
        # the sandbox has a /tmp of its own; there the program may write, and outside nothing changed (hostile_files)
        assert not list(PROJECT.glob("hostile*"))
    else:
        assert b"SUCCESS" not in after.ended.stdout, after.ended
    assert b"SyntaxError" not in after.ended.stderr_tail and b"NameError" not in after.ended.stderr_tail, after.ended
    assert after.seconds < LIMITS.wall_s + 60  # ended by its limits, however slow the machine
    assert not after.left
    assert (after.good.outcome, after.good.stdout) == ("ok", b"42\n")


def test_there_are_many_attacks() -> None:
    assert len(ATTACKS) >= 60
    assert len(set(ATTACKS.values())) == len(ATTACKS)


def test_limits_show_in_the_outcome(aftermath: dict[str, Aftermath]) -> None:
    assert aftermath["sleep"].ended.outcome == "timeout"
    patient = LIMITS.model_copy(update={"wall_s": 60})  # so that the limit in question is the first on any machine

    def attack(name: str) -> Finished:
        return python(PRELUDE + ATTACKS[name], limits=patient)

    assert python("while True: pass", limits=patient).returncode == 128 + 9
    talkative = attack("output_forever")
    assert talkative.outcome == "output"
    assert len(talkative.stdout) == LIMITS.output_kib << 10
    assert attack("memory_in_children").outcome == "memory"
    assert attack("memory_sockets").outcome == "memory"
    assert b"MemoryError" in attack("memory_bytes").stderr_tail
    assert len(attack("error_output_forever").stderr_tail) == 4096


def test_self_test_holds() -> None:
    self_test()


def without(*words: str) -> Callable[..., list[str]]:
    """sandbox_command with these arguments, which may be given by their beginnings, left out where they stand last."""

    def found(argv: list[str]) -> bool:
        return all(
            argument == word or (word[-1:] in "=" and argument.startswith(word))
            for argument, word in zip(argv, words, strict=False)
        )

    def weak(*args: Any, **kwargs: Any) -> list[str]:
        argv = sandbox_command(*args, **kwargs)
        at = max(i for i in range(len(argv)) if found(argv[i:]))
        return argv[:at] + argv[at + len(words) :]

    return weak


@pytest.mark.parametrize(
    ("words", "leak"),
    [
        (["--unshare-net"], "network"),
        (["--disable-userns"], "namespaces can be made"),
        (["--seccomp", ""], "shared memory"),
        (["--seccomp", ""], "sockets that reach beyond a process can be made"),
        (["--seccomp", ""], "buffers of sockets"),
        (["--seccomp", ""], "descriptors can be sent"),
        (["--seccomp", ""], "extended attributes"),
        (["--remount-ro", "/dev"], "/dev/shm/x can be written"),
        (["--remount-ro", "/"], "/x can be written"),
        (["--remount-ro", "/proc"], "/proc/sys/kernel/shmmax can be written"),
        (["--nproc="], "number of processes"),
        (["--as="], "memory"),
        (["--fsize="], "size of files"),
        (["-i"], "environment"),
    ],
)
def test_self_test_finds_each_leak(words: list[str], leak: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setattr(bubblewrap, "sandbox_command", without(*words))
    with pytest.raises(SandboxError, match=leak):
        self_test()


def test_a_sandbox_that_does_not_start_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "_NOBODY", "no number")
    with pytest.raises(SandboxError, match="did not start"):
        python("print(1)")


def test_missing_bubblewrap_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name, path: None if name == "bwrap" else f"/usr/bin/{name}")
    with pytest.raises(SandboxError, match="apt install bubblewrap"):
        python("print(1)")


def test_input_and_output_of_any_size_pass() -> None:
    limits = PATIENT.model_copy(update={"output_kib": 2048})
    text = os.urandom(1 << 20)
    ended = python("import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())", stdin=text, limits=limits)
    assert (ended.returncode, ended.stdout) == (0, text)
    assert python("print(1)", stdin=text, limits=PATIENT).stdout == b"1\n"


def test_return_codes_pass() -> None:
    assert python("raise SystemExit(7)", limits=PATIENT).returncode == 7
    assert python("import os; os.kill(os.getpid(), 11)", limits=PATIENT).returncode == 128 + 11


def test_asyncio_works() -> None:
    code = "import asyncio, sys\nasync def f(): return 42\nprint(asyncio.run(f()))"
    assert python(code, limits=PATIENT).stdout == b"42\n"


def test_packages_of_the_environment_are_there() -> None:
    limits = SandboxLimits(cpu_s=10, wall_s=20, memory_mib=1024)
    assert python("import numpy; print(numpy.arange(3).sum())", limits=limits).stdout == b"3\n"


def test_a_worker_talks_and_dies_with_its_group() -> None:
    """The long-lived use: more folders to read, variables, and a conversation."""
    marker = f"quatro-{secrets.token_hex(6)}"
    code = "import os, sys, quatro_ray.types; print(os.environ['OMP_NUM_THREADS'], input(), flush=True); input()"
    env = {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    limits = PATIENT.model_copy(update={"memory_mib": 1024})
    with sandboxed([sys.executable, "-c", code, marker], limits, read_only=[PROJECT / "quatro_ray"], env=env) as launch:
        worker = subprocess.Popen(
            launch.argv,
            pass_fds=launch.pass_fds,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
    assert worker.stdin and worker.stdout
    worker.stdin.write(b"hello\n")
    worker.stdin.flush()
    assert worker.stdout.readline() == b"1 hello\n"
    os.killpg(worker.pid, 9)
    assert worker.stdout.read() == b""
    worker.communicate()
    deadline = time.monotonic() + 20
    while marked(marker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not marked(marker)


def test_the_filter_has_one_form_a_machine() -> None:
    assert len(seccomp_filter("x86_64")) == len(seccomp_filter("aarch64"))
    assert seccomp_filter("x86_64") != seccomp_filter("aarch64")
    with pytest.raises(SandboxError, match="sparc"):
        seccomp_filter("sparc")
