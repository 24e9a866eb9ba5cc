"""What is answered before torch is imported: classes, listings, exports, and checkpoints that
cannot be had.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from config import RunConfig
from models.hub import answers_within, find_cached_file, find_commit, is_hub_id, locate_source
from models.labels import folder_name, resolve_name
from models.pins import pin_checkpoint
from runs.start import OFFLINE, check_checkpoints, list_hub_checkpoints
from system.paths import is_same_source
from tests.conftest import LABELS, error_of, flags
from tests.runs.conftest import sweep_over
from tokens.class_token import load_token, save_token
from utils import ROOT, UserError

OLD, NEW = "1" * 40, "2" * 40  # commits
MINIATURE = ["--config", "configs/miniature.yml"]
ANSWERS = [  # a command, its exit code, and what it prints
    (
        ["run.py", *MINIATURE, "--class_index", "mous", "--train", "True"],
        2,
        "did you mean 'mouse'?",
    ),
    (["run.py", *MINIATURE, "--class_index", "17", "--train", "True"], 2, "classes are 1 to 16"),
    (
        ["run.py", *MINIATURE, "--class_index", "jaguar cat"],
        2,
        (
            "python run.py --config configs/miniature.yml --class_index 'jaguar cat' --train True"
            " --evaluate True"
        ),
    ),
    (
        ["run.py", "tiger cat"],
        2,
        "python run.py --class_index 'tiger cat' --train True --evaluate True",
    ),
    (["run.py", "--class_index", "tigre cat", "--train", "True"], 2, "did you mean 'tiger cat'?"),
    (
        ["run.py", "--class_index", "283", "--train", "True"],
        2,
        "cannot open 'CompVis/stable-diffusion-v1-4'",
    ),
    (
        [
            "run.py",
            *MINIATURE,
            "--model",
            "nobody/nothing",
            "--class_index",
            "7",
            "--train",
            "True",
        ],
        2,
        "cannot open 'nobody/nothing': it is not downloaded yet and the hub cannot be reached",
    ),
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


@pytest.mark.parametrize(
    "argv, code, right", ANSWERS, ids=[" ".join(argv) for argv, _, _ in ANSWERS]
)
def test_an_answer_that_needs_no_torch(argv, code, right):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code and right in done.stdout + done.stderr
    assert code == 0 or len(done.stderr.strip().splitlines()) == 1


WITHOUT_UNIX = """
import builtins, runpy, sys
real_import = builtins.__import__
sys.argv = sys.argv[1:]

def import_module(name, globals=None, *more, **named):
    file = (globals or {}).get("__file__", "")
    is_ours = file.startswith(OURS) and "site-packages" not in file
    if name in ("fcntl", "resource", "termios", "pwd", "grp") and is_ours:
        raise ModuleNotFoundError(f"No module named '{name}'")
    return real_import(name, globals, *more, **named)

builtins.__import__ = import_module
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_platform_without_unix_modules(tiny_config, tmp_path):
    """Windows has neither fcntl nor resource: our own code imports neither at its top, and a class
    is learned.
    """
    argv = flags(tiny_config, class_index=3, train=True, evaluate=True, num_train_epochs=1)
    code = WITHOUT_UNIX.replace("OURS", repr(str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", code, "run.py", *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (cost,) = tmp_path.rglob("cost.json")
    assert json.loads(cost.read_text())["peak_memory_gb"] is None


def test_plots_and_distances_are_imported_by_evaluations_alone():
    code = (
        "import runs.session, sys; print([m for m in ('matplotlib', 'torchmetrics', "
        "'torch_fidelity') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["run", "export", "app", "experiments.study", "benchmarks.cost"])
def test_how_threads_wait_is_settled_before_torch_is_imported(tmp_path, module):
    """OpenMP reads it when its library is loaded; a torch that only tells stands in its place."""
    (tmp_path / "torch.py").write_text(
        "import os; print(os.environ['OMP_WAIT_POLICY']); os._exit(0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("OMP_WAIT_POLICY", None)
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}, runs.session"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "PASSIVE\n", done.stderr


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
    code = (
        "import http.server as h; s = h.HTTPServer(('127.0.0.1', 0), h.BaseHTTPRequestHandler); "
        "print(s.server_port, flush=True); s.handle_request()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        # with status 501
        assert answers_within(f"http://127.0.0.1:{int(server.stdout.readline())}", 10)


def test_a_hub_that_says_nothing_is_asked_once(silent_server, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": silent_server, "HF_HOME": str(tmp_path)}
    environment.pop(OFFLINE)
    before = time.monotonic()
    done = subprocess.run(
        [sys.executable, "run.py", "--class_index", "283", "--train", "True"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "the hub cannot be reached" in done.stderr
    assert time.monotonic() - before < 10  # 3.4 s where nothing else runs


def test_timm_does_not_ask_a_silent_hub_again(silent_server, tiny_config, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": silent_server, "HF_HOME": str(tmp_path)}
    environment.pop(OFFLINE)
    argv = flags(tiny_config, classifier="timm:resnet18", class_index=283, train=True)
    before = time.monotonic()
    done = subprocess.run(
        [sys.executable, "run.py", *argv], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "the hub cannot be reached" in done.stderr
    assert time.monotonic() - before < 30  # with timm's import; retries take 41 s


def cache_repository(hub: Path, hub_id: str, source: str, commit: str):
    """What a download of a repository's `main` leaves on this disk."""
    folder = hub / f"models--{hub_id.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text(commit)
    shutil.copytree(source, folder / "snapshots" / commit)


@pytest.fixture
def offline_run(silent_server, tiny_config, tmp_path):
    """Runs run.py on checkpoints of a hub that does not answer, from the cache."""
    for hub_id, source in (
        ("some/generator", tiny_config.model),
        ("some/classifier", tiny_config.classifier),
    ):
        cache_repository(tmp_path / "hub", hub_id, source, OLD)
    environment = {**os.environ, "HF_ENDPOINT": silent_server, "HF_HOME": str(tmp_path)}
    environment.pop(OFFLINE)

    def run_command(*more, program=("run.py",)):
        argv = flags(
            tiny_config,
            *more,
            model="some/generator",
            classifier="some/classifier",
            train=True,
            evaluate=True,
            num_train_epochs=1,
            output_path=tmp_path / "out",
        )
        return subprocess.run(
            [sys.executable, *program, *argv],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )

    return run_command


def test_what_was_downloaded_is_used_without_the_hub(offline_run, tmp_path):
    """A whole run from the hub's cache; no library waits for the hub that does not answer."""
    done = offline_run("--class_index", "crane bird")
    assert done.returncode == 0 and done.stderr.count("the hub does not answer") == 1
    assert list(tmp_path.rglob("learned_embeds.safetensors"))
    done = offline_run("--class_index", "tigre cat", program=("-c", WITHOUT_TORCH, "run.py"))
    assert done.returncode == 2 and "did you mean 'tiger cat'?" in done.stderr
    listed = offline_run("--list_classes")
    assert listed.stdout.splitlines() == [f"{i:5d}  {label}" for i, label in enumerate(LABELS, 1)]


def test_a_token_of_another_commit_is_refused(tmp_path):
    """And one whose settings know no commit, as of an earlier version, is taken for the present
    one's.
    """
    (folder,) = sweep_over(tmp_path).folders[:1]
    settings = {
        "model": f"some/generator@{OLD}",
        "classifier": "inet",
        "lr": 0.1,
        "skip_exists": True,
    }
    folder.begin_training(settings, start_over=False)
    save_token(folder.token_file, "newclas", torch.zeros(1, 4), (4,), {})
    names = ["model", "classifier"]
    folder.refuse_other_settings(settings, names)
    folder.refuse_other_settings({**settings, "classifier": f"inet@{NEW}"}, names)
    with pytest.raises(UserError, match=f"model some/generator@{OLD}, now some/generator@{NEW}"):
        folder.refuse_other_settings({**settings, "model": f"some/generator@{NEW}"}, names)


@pytest.mark.slow
def test_a_hub_id_that_moves_is_another_checkpoint(offline_run, tiny_config, tmp_path):
    """A token of one commit is not drawn with another's weights and counted with the first's; a
    revision goes on.
    """
    done = offline_run("--class_index", "3")
    assert done.returncode == 0, done.stderr
    (config,) = tmp_path.rglob("config.yml")
    assert (
        f"model: some/generator@{OLD}" in config.read_text()
        and f"some/classifier@{OLD}" in config.read_text()
    )
    assert (
        load_token(config.with_name("learned_embeds.safetensors")).header["base_model"]
        == f"some/generator@{OLD}"
    )
    (picture,) = tmp_path.rglob("with/0.png")
    drawn = picture.read_bytes()
    cache_repository(
        tmp_path / "hub", "some/generator", other_weights(tiny_config.model, tmp_path), NEW
    )
    larger = ("--class_index", "3", "--test_size", "3")
    done = offline_run(*larger)
    assert (
        done.returncode == 2
        and f"model some/generator@{OLD}, now some/generator@{NEW}" in done.stderr
    )
    assert picture.read_bytes() == drawn
    done = offline_run(*larger, "--train", "False")
    assert (
        done.returncode == 0
        and f"trained with model some/generator@{OLD}, now some/generator@{NEW}" in done.stderr
    )
    assert picture.read_bytes() != drawn
    done = offline_run(*larger, "--model", f"some/generator@{OLD}")
    assert done.returncode == 0 and "warning" not in done.stderr
    assert picture.read_bytes() == drawn and picture.with_name("2.png").exists()


def other_weights(source: str, folder: Path) -> str:
    """A copy of a generator whose UNet has changed."""
    shutil.copytree(source, folder / "other")
    for file in (folder / "other/unet").glob("*.safetensors"):
        save_file(
            {key: value * 1.5 for key, value in load_file(file).items()},
            file,
            metadata={"format": "pt"},
        )
    return str(folder / "other")


TIMM = """
import timm, torch
from safetensors.torch import save_file
from models.classifiers import load_classifier
from models.pins import pin_checkpoint

model = timm.create_model("resnet18")
save_file(model.state_dict(), SNAPSHOT)
name = pin_checkpoint("timm:resnet18")
loaded = load_classifier(name, "cpu").model
weights = [network.state_dict()["conv1.weight"] for network in (model, loaded)]
print(name, torch.equal(*weights))
"""


@pytest.mark.slow
def test_timm_s_own_names_are_pinned_too(tmp_path):
    """To the commit of the repository in which timm finds their weights."""
    folder = tmp_path / "hub/models--timm--resnet18.a1_in1k"
    snapshot = folder / "snapshots" / OLD
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(OLD)
    code = TIMM.replace("SNAPSHOT", repr(str(snapshot / "model.safetensors")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path), OFFLINE: "1"},
    )
    assert done.stdout.split() == [f"timm:resnet18@{OLD}", "True"], done.stderr


def test_the_hub_tells_the_commit_of_a_revision():
    server = (
        "import http.server as h, json\nclass Hub(h.BaseHTTPRequestHandler):\n    def"
        " do_GET(self):\n        self.send_response(200); self.end_headers()\n       "
        " self.wfile.write(json.dumps({'id': 'some/model', 'sha': self.path}).encode())\ns ="
        " h.HTTPServer(('127.0.0.1', 0), Hub); print(s.server_port, flush=True); s.serve_forever()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", server], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{int(hub.stdout.readline())}",
        }
        environment.pop(OFFLINE)
        code = "from models.hub import find_commit as f; print(f('some/model'), f('some/model@v2'))"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        hub.kill()
    assert done.stdout.split() == [
        "/api/models/some/model",
        "/api/models/some/model/revision/v2",
    ], done.stderr


def test_a_hub_id_may_have_a_revision_everywhere(monkeypatch):
    monkeypatch.setattr("models.pins.find_commit", lambda hub_id: f"commit-of-{hub_id}")
    assert pin_checkpoint("some/model") == "some/model@commit-of-some/model"
    assert pin_checkpoint("mean:some/vit@v2") == "mean:some/vit@commit-of-some/vit@v2"
    assert pin_checkpoint("zero-shot:some/clip") == "zero-shot:some/clip@commit-of-some/clip"
    assert pin_checkpoint("timm:hf-hub:some/vit@v1") == "timm:hf-hub:some/vit@commit-of-some/vit@v1"
    assert pin_checkpoint("timm:resnet18") == "timm:resnet18@commit-of-timm/resnet18.a1_in1k"
    assert pin_checkpoint("inet") == "inet@commit-of-google/vit-large-patch16-224"
    for name in ("miniature", "miniature/weights/generator", "inception"):
        assert pin_checkpoint(name) == name
    assert resolve_name("inet@abc") == ("", "google/vit-large-patch16-224@abc")
    assert folder_name("inet@abc") == "inet" and folder_name("mean:some/vit@abc") == "mean_some_vit"
    assert find_commit(f"some/model@{OLD}") == OLD
    assert [is_hub_id(name) for name in ("a/b@v1", "a/b", "miniature/weights@v1", "b@v1")] == [
        True,
        True,
        False,
        False,
    ]
    assert is_same_source("a/b", f"a/b@{OLD}") and not is_same_source(f"a/b@{NEW}", f"a/b@{OLD}")
    with pytest.raises(UserError, match="only hub ids have revisions"):
        locate_source("miniature/weights@v1")


def test_a_listing_opens_the_classifier_alone():
    (checkpoint,) = list_hub_checkpoints(RunConfig(classifier="a/vit"))
    assert checkpoint.name == "a/vit"


def test_only_what_a_command_opens_is_looked_for(tiny_config):
    def list_names(**changes):
        settings = {
            "model": tiny_config.model,
            "classifier": tiny_config.classifier,
            "train": True,
            **changes,
        }
        return [checkpoint.source for checkpoint in list_hub_checkpoints(RunConfig(**settings))]

    assert list_names() == list_names(evaluator="a/judge") == []
    assert list_names(evaluator="a/judge", evaluate=True) == ["a/judge"]
    assert list_names(evaluate=True, features="a/features") == []
    assert list_names(evaluate=True, features="a/features", real_images="photos") == ["a/features"]
    assert list_names(classifier="timm:resnet50") == ["resnet50"]
    assert list_names(classifier="timm:local-dir:resnet50") == []
    assert (
        list_names(classifier="timm:hf-hub:a/vit")
        == list_names(classifier="mean:a/vit")
        == ["a/vit"]
    )
    assert list_names(model="a/model", classifier="inet") == [
        "a/model",
        "google/vit-large-patch16-224",
    ]


def test_a_name_that_is_neither_folder_nor_hub_id():
    with pytest.raises(UserError, match="cannot open 'inett': no such folder.*did you mean 'inet'"):
        check_checkpoints(
            RunConfig(model=str(ROOT / "miniature/weights/generator"), classifier="inett")
        )


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"id2label": {"a": "b"}}', '{"id2label": [1]}', "{}"]
)
def test_a_config_that_tells_no_labels_is_left_to_the_loader(
    capsys, tiny_config, tmp_path, content
):
    shutil.copytree(tiny_config.classifier, tmp_path / "vit")
    (tmp_path / "vit/config.json").write_text(content)
    line = error_of(
        capsys,
        *flags(tiny_config, classifier=tmp_path / "vit", class_index="no such", train=True),
    )
    # transformers makes up two labels for "{}"
    assert str(tmp_path / "vit") in line or "class_index" in line


def test_what_was_never_downloaded():
    assert find_cached_file("nobody/nothing", "config.json") is None
    assert find_cached_file("not a hub id", "config.json") is None
