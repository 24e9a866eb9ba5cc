"""The kit for a GPU, with tiny networks on a CPU: every stage runs, and what is done stays when it
is cut off.
"""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu
from utils import ROOT


def run_kit(*options):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_a_run_that_is_cut_off_goes_on(tmp_path):
    cut = run_kit("--tiny", "--out", tmp_path, "--seconds", "6")
    first = json.loads((tmp_path / "gpu.json").read_text())
    assert (
        cut.returncode == 2
        and "not complete: right" in cut.stderr
        and "Traceback" not in cut.stderr
    )
    assert (
        "cut off after" in first["ended"]["right"]
        and "cut off after" in (tmp_path / "gpu.md").read_text()
    )
    whole = run_kit("--tiny", "--out", tmp_path)
    assert whole.returncode == 0, whole.stderr[-3000:] + (tmp_path / "gpu.md").read_text()
    found, page = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    assert all(found["rows"]["right"][name] == row for name, row in first["rows"]["right"].items())
    assert (
        found["ended"] == dict.fromkeys(gpu.STAGES, "complete") and found["about"]["torch"] in page
    )
    for name, stage in gpu.STAGES.items():
        assert set(found["rows"][name]) == set(stage.list_rows(tmp_path, "cpu", True))
        assert all(row in page for row in found["rows"][name])
    assert all(row["passed"] == "yes" for row in found["rows"]["right"].values())
    assert all(
        row["s per update and class"] > 0
        for row in found["rows"]["cost"].values()
        if "peak GB" in row and "s per picture" not in row
    )


def test_the_plan_names_every_row():
    done = run_kit("--plan")
    assert done.returncode == 0
    assert all(
        row in done.stdout
        for stage in gpu.STAGES.values()
        for row in stage.list_rows(ROOT, "cuda", False)
    )


def test_no_gpu_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        gpu.run_script(lambda: gpu.main(["--out", str(tmp_path / "new")]))
    assert "nvidia-smi" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_importing_does_not_ask_for_cuda():
    """Or its forked processes could not use the card."""
    code = (
        "import torch\n"
        "torch.cuda.device_count = lambda: 1\n"  # what the driver's library says
        "del torch._C._cuda_getDeviceCount\n"  # what asks CUDA
        "import benchmarks.gpu"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
