"""What is answered before torch is imported: classes, listings, exports, and checkpoints that cannot be had."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from config import RunConfig
from models.hub import answers_within, find_cached_file
from runs.start import OFFLINE, check_checkpoints, list_hub_checkpoints
from tests.conftest import LABELS
from tests.test_run import error_of, flags
from utils import ROOT, UserError

MINIATURE = ["--config", "configs/miniature.yml"]
ANSWERS = [  # a command, its exit code, and what it prints
    (["run.py", *MINIATURE, "--class_index", "mous", "--train", "True"], 2, "did you mean 'mouse'?"),
    (["run.py", *MINIATURE, "--class_index", "17", "--train", "True"], 2, "classes are 1 to 16"),
    (["run.py", *MINIATURE, "--class_index", "jaguar cat"], 2,
     "python run.py --config configs/miniature.yml --class_index 'jaguar cat' --train True --evaluate True"),
    (["run.py", "tiger cat"], 2, "python run.py --class_index 'tiger cat' --train True --evaluate True"),
    (["run.py", "--class_index", "tigre cat", "--train", "True"], 2, "did you mean 'tiger cat'?"),
    (["run.py", "--class_index", "283", "--train", "True"], 2, "cannot open 'CompVis/stable-diffusion-v1-4'"),
    (["run.py", *MINIATURE, "--model", "nobody/nothing", "--class_index", "7", "--train", "True"], 2,
     "cannot open 'nobody/nothing': it is not downloaded yet and the hub cannot be reached"),
    (["run.py", *MINIATURE, "--list_classes"], 0, "    7  jaguar, cat"),
    (["run.py", "--list_classes"], 0, "  283  tiger cat"),
    (["run.py", "--help"], 0, "--class_index"),
    (["export.py"], 2, "the following arguments are required: RUN_DIR, --to"),
    (["export.py", "nowhere", "--to", "gallery"], 2, "'nowhere' is not a run's folder"),
    (["export.py", "img/inet/0283_tiger_cat/demo", "--to", "gallery"], 2, "holds no token"),
    (["export.py", "nowhere", "--to", "run.py"], 2, "'run.py' is a file"),
]
WITHOUT_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    sys.exit(99) if "torch" in sys.modules else None
"""


@pytest.mark.parametrize("argv, code, right", ANSWERS, ids=[" ".join(argv) for argv, _, _ in ANSWERS])
def test_an_answer_that_needs_no_torch(argv, code, right):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and right in done.stdout + done.stderr
    assert code == 0 or len(done.stderr.strip().splitlines()) == 1


WITHOUT_UNIX = """
import builtins, runpy, sys
real_import = builtins.__import__
sys.argv = sys.argv[1:]

def import_module(name, globals=None, *more, **named):
    file = (globals or {}).get("__file__", "")
    if name in ("fcntl", "resource", "termios", "pwd", "grp") and file.startswith(OURS) and "site-packages" not in file:
        raise ModuleNotFoundError(f"No module named '{name}'")
    return real_import(name, globals, *more, **named)

builtins.__import__ = import_module
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_platform_without_unix_modules(tiny_config, tmp_path):
    """Windows has neither fcntl nor resource: our own code imports neither at its top, and a class is learned."""
    argv = flags(tiny_config, "--class_index", "3", "--train", "True", "--evaluate", "True", "--num_train_epochs", "1")
    code = WITHOUT_UNIX.replace("OURS", repr(str(ROOT)))
    done = subprocess.run([sys.executable, "-c", code, "run.py", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cost, = tmp_path.rglob("cost.json")
    assert json.loads(cost.read_text())["peak_memory_gb"] is None


def test_plots_and_distances_are_imported_by_evaluations_alone():
    code = "import runs.session, sys; print([m for m in ('matplotlib', 'torchmetrics', " \
           "'torch_fidelity') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["run", "export", "app", "experiments.common", "benchmarks.cost"])
def test_how_threads_wait_is_settled_before_torch_is_imported(module):
    """OpenMP reads it when its library is loaded."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", f"import {module}, runs.session"], cwd=ROOT,
                          capture_output=True, text=True)
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")]
    assert imported.index("utils") < imported.index("torch")


@pytest.fixture
def silent_server():
    """The address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_says_nothing_does_not_answer(silent_server):
    before = time.monotonic()
    assert not answers_within(silent_server, 0.3)
    assert time.monotonic() - before < 2
    assert not answers_within("http://127.0.0.1:9", 0.3)  # nobody listens there


def test_any_answer_is_one(tmp_path):
    code = "import http.server as h; s = h.HTTPServer(('127.0.0.1', 0), h.BaseHTTPRequestHandler); " \
           "print(s.server_port, flush=True); s.handle_request()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True) as server:
        assert answers_within(f"http://127.0.0.1:{int(server.stdout.readline())}", 10)  # with status 501


def test_a_hub_that_says_nothing_is_asked_once(silent_server, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": silent_server, "HF_HOME": str(tmp_path)}
    environment.pop(OFFLINE)
    before = time.monotonic()
    done = subprocess.run([sys.executable, "run.py", "--class_index", "283", "--train", "True"], cwd=ROOT,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "the hub cannot be reached" in done.stderr
    assert time.monotonic() - before < 10  # 3.4 s where nothing else runs


def test_timm_does_not_ask_a_silent_hub_again(silent_server, tiny_config, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": silent_server, "HF_HOME": str(tmp_path)}
    environment.pop(OFFLINE)
    argv = flags(tiny_config, "--classifier", "timm:resnet18", "--class_index", "283", "--train", "True")
    before = time.monotonic()
    done = subprocess.run([sys.executable, "run.py", *argv], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "the hub cannot be reached" in done.stderr
    assert time.monotonic() - before < 30  # with timm's import; retries take 41 s


def test_what_was_downloaded_is_used_without_the_hub(silent_server, tiny_config, tmp_path):
    """A whole run from the hub's cache; no library waits for the hub that does not answer."""
    for hub_id, source in (("some/generator", tiny_config.model), ("some/classifier", tiny_config.classifier)):
        folder = tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("1" * 40)
        shutil.copytree(source, folder / "snapshots" / ("1" * 40))
    environment = {**os.environ, "HF_ENDPOINT": silent_server, "HF_HOME": str(tmp_path)}
    environment.pop(OFFLINE)
    argv = flags(tiny_config, "--model", "some/generator", "--classifier", "some/classifier", "--class_index",
                 "crane bird", "--train", "True", "--num_train_epochs", "1", "--output_path", str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "run.py", *argv], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("learned_embeds.safetensors"))
    argv[argv.index("crane bird")] = "tigre cat"
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, "run.py", *argv], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'tiger cat'?" in done.stderr
    listed = subprocess.run([sys.executable, "run.py", "--classifier", "some/classifier", "--list_classes"], cwd=ROOT,
                            env=environment, capture_output=True, text=True)
    assert listed.stdout.splitlines() == [f"{i:5d}  {label}" for i, label in enumerate(LABELS, 1)]


def test_a_listing_opens_the_classifier_alone():
    checkpoint, = list_hub_checkpoints(RunConfig(classifier="a/vit"))
    assert checkpoint.name == "a/vit"


def test_only_what_a_command_opens_is_looked_for(tiny_config):
    def list_names(**changes):
        settings = {"model": tiny_config.model, "classifier": tiny_config.classifier, "train": True, **changes}
        return [checkpoint.source for checkpoint in list_hub_checkpoints(RunConfig(**settings))]

    assert list_names() == list_names(evaluator="a/judge") == []
    assert list_names(evaluator="a/judge", evaluate=True) == ["a/judge"]
    assert list_names(evaluate=True, features="a/features") == []
    assert list_names(evaluate=True, features="a/features", real_images="photos") == ["a/features"]
    assert list_names(classifier="timm:resnet50") == ["resnet50"]
    assert list_names(classifier="timm:local-dir:resnet50") == []
    assert list_names(classifier="timm:hf-hub:a/vit") == list_names(classifier="mean:a/vit") == ["a/vit"]
    assert list_names(model="a/model", classifier="inet") == ["a/model", "google/vit-large-patch16-224"]


def test_a_name_that_is_neither_folder_nor_hub_id():
    with pytest.raises(UserError, match="cannot open 'inett': no such folder.*did you mean 'inet'"):
        check_checkpoints(RunConfig(model=str(ROOT / "miniature/weights/generator"), classifier="inett"))


@pytest.mark.parametrize("content", ["[]", "{", '{"id2label": {"a": "b"}}', '{"id2label": [1]}', "{}"])
def test_a_config_that_tells_no_labels_is_left_to_the_loader(capsys, tiny_config, tmp_path, content):
    shutil.copytree(tiny_config.classifier, tmp_path / "vit")
    (tmp_path / "vit/config.json").write_text(content)
    line = error_of(capsys, *flags(tiny_config, "--classifier", str(tmp_path / "vit"), "--class_index", "no such",
                                   "--train", "True"))
    assert str(tmp_path / "vit") in line or "class_index" in line  # transformers makes up two labels for "{}"


def test_what_was_never_downloaded():
    assert find_cached_file("nobody/nothing", "config.json") is None
    assert find_cached_file("not a hub id", "config.json") is None
