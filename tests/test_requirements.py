"""Which releases are taken: the lowest are pinned, and a torch that is there stays there."""

import json
import re
import subprocess
import venv
from pathlib import Path

import pytest

from utils import ROOT

REQUIREMENT = re.compile(r"([\w-]+)(>=|==)([\d.]+)")


def read_requirements(name: str) -> list[tuple[str, str, str]]:
    """(package, '>=' or '==', release) of every line; a line of another form is an error."""
    lines = [
        line.partition("#")[0].strip()
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    ]
    return [REQUIREMENT.fullmatch(line).groups() for line in lines if line]


def test_the_lowest_releases_are_pinned():
    lowest = {
        package: release for package, _, release in read_requirements("requirements-lowest.txt")
    }
    for package, sign, release in read_requirements("requirements.txt"):
        assert sign == ">=" and (lowest[package] + ".").startswith(release + ".")
    assert len(lowest) == len(read_requirements("requirements.txt"))


def add_installed(folder: Path, package: str, release: str, needs: str = ""):
    """What pip sees of an installed package: its metadata."""
    info = folder / f"{package}-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package}\nVersion: {release}\n{needs}"
    )
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text("")


@pytest.mark.slow
@pytest.mark.parametrize(
    "torch, torchvision",
    [
        ("2.8.0", "0.23.0"),
        ("2.8.0+cu128", "0.23.0+cu128"),
        ("2.11.0", "0.26.0"),
        ("2.11.0+cu130", "0.26.0+cu130"),
    ],
)
def test_a_torch_that_is_there_stays_there(tmp_path, torch, torchvision):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")

    def install(*wanted: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [
                python,
                "-m",
                "pip",
                "install",
                "--dry-run",
                "--quiet",
                "--report",
                tmp_path / "report.json",
                *wanted,
            ],
            capture_output=True,
            text=True,
        )

    if install("pyyaml").returncode:
        pytest.skip("no package registry can be reached")
    add_installed(packages, "torch", torch)
    add_installed(
        packages,
        "torchvision",
        torchvision,
        f"Requires-Dist: torch (=={torch.partition('+')[0]})\n",
    )
    done = install("-r", str(ROOT / "requirements.txt"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    chosen = {item["metadata"]["name"].lower() for item in report["install"]}
    assert {"diffusers", "transformers", "timm", "torchmetrics"} <= chosen
    assert not chosen & {"torch", "torchvision"} and not [
        name for name in chosen if name.startswith("nvidia")
    ]
