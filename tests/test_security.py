"""Nothing let in: no untrusted pickle, code, name or label does anything; no secret gets out."""

import html.parser
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import ViTForImageClassification

from config import RunConfig
from evaluation import report
from models.classifiers import load_classifier, load_labels
from models.labels import folder_name
from prompt_datasets import class_folder, class_name
from run import main
from tests.conftest import LABELS, error_of, flags, save_classifier
from tokens.class_token import load_token, save_token
from utils import ROOT, UserError

HOSTILE = [
    "../../x",
    "/etc/passwd",
    "..",
    "a\0b",
    "x" * 300,
    "🦩",
    "CON",
    "<script>alert(1)</script>",
    "\x1b]0;owned\x07red",
    "two\nlines",
    "",
    "C:\\x",
    "$(id)",
    "'; --",
    "{}",
    "%s{0}",
]


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, sign: Path):
        self.sign = sign

    def __reduce__(self):
        return os.mkdir, (str(self.sign),)


@pytest.fixture
def sign(tmp_path):
    """What a bomb that goes off leaves; a pickle that holds one really does."""
    (tmp_path / "sign").mkdir()
    proof = tmp_path / "sign" / "proof"
    pickle.loads(pickle.dumps(Bomb(proof)))
    assert proof.exists()
    return tmp_path / "sign" / "owned"


def plant(path: Path, sign: Path, kind: str):
    """A file of weights that is a bomb, as torch or as pickle writes one."""
    if kind == "torch":
        torch.save({"weight": Bomb(sign)}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Bomb(sign)}))


def hub_copy(source: str, folder: Path) -> Path:
    """A checkpoint without its safetensors, as one that exists only as .bin."""
    shutil.copytree(source, folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


@pytest.mark.parametrize("kind", ["torch", "pickle"])
@pytest.mark.parametrize(
    "part, name",
    [
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "pytorch_model"),
    ],
)
def test_no_pickle_of_a_generator_is_executed(
    capsys, tiny_config, tmp_path, sign, kind, part, name
):
    model = tmp_path / "model"
    shutil.copytree(tiny_config.model, model)
    for file in (model / part).glob("*.safetensors"):
        file.unlink()
    for variant in ("", ".fp16"):
        plant(model / part / f"{name}{variant}.bin", sign, kind)
    line = error_of(capsys, *flags(tiny_config, model=model, class_index=3, train=True))
    assert "cannot open" in line and not sign.exists()


@pytest.mark.parametrize("kind", ["torch", "pickle"])
@pytest.mark.parametrize("called", ["{}", "mean:{}", "timm:local-dir:{}"])
def test_no_pickle_of_a_classifier_is_executed(capsys, tiny_config, tmp_path, sign, kind, called):
    folder = hub_copy(tiny_config.classifier, tmp_path / "classifier")
    if called.startswith("timm"):
        (folder / "config.json").write_text(
            json.dumps({"architecture": "resnet18", "num_classes": 3})
        )
    plant(folder / "pytorch_model.bin", sign, kind)
    with pytest.raises(UserError, match="cannot open"):
        load_classifier(called.format(folder), "cpu")
    assert not sign.exists()


def test_a_harmless_bin_is_read(tiny_classifier, tmp_path):
    """So that the tests above refuse what is hostile and not whatever is a .bin."""
    folder = hub_copy(tiny_classifier, tmp_path / "classifier")
    torch.save(
        ViTForImageClassification.from_pretrained(tiny_classifier).state_dict(),
        folder / "pytorch_model.bin",
    )
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(
        load_classifier(str(folder), "cpu")(images), load_classifier(tiny_classifier, "cpu")(images)
    )


@pytest.mark.parametrize("kind", ["torch", "pickle"])
@pytest.mark.parametrize("name", ["token.bin", "token.pt", "token.safetensors"])
def test_no_pickled_token_is_executed(tmp_path, sign, kind, name):
    plant(tmp_path / name, sign, kind)
    with pytest.raises(UserError, match="is not a token file"):
        load_token(tmp_path / name)
    assert not sign.exists()


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_no_pickled_inception_is_executed(capsys, tiny_config, tmp_path, sign, kind):
    plant(tmp_path / "inception.pth", sign, kind)
    line = error_of(
        capsys,
        *flags(
            tiny_config,
            class_index=3,
            train=True,
            evaluate=True,
            test_size=6,
            real_images="tests.drawings:draw_noise",
            features=f"inception:{tmp_path}/inception.pth",
        ),
    )
    assert "cannot open" in line and not sign.exists()


@pytest.mark.parametrize("kind", ["torch", "pickle"])
@pytest.mark.parametrize(
    "pattern",
    [
        "training_state.pt",
        "learned_embeds.safetensors",
        "vectors.safetensors",
        "history.jsonl",
        "config.yml",
        "drawn.json",
    ],
)
def test_no_pickle_among_a_run_s_files_is_executed(tiny_config, tmp_path, sign, kind, pattern):
    argv = flags(
        tiny_config, class_index=3, train=True, evaluate=True, num_train_epochs=2, fresh_noise=True
    )
    assert main(argv) == 0
    tokens = next(tmp_path.rglob("config.yml")).parent
    if pattern in ("training_state.pt", "history.jsonl"):
        (tokens / "learned_embeds.safetensors").unlink()
        plant(tokens / "training_state.pt", sign, kind)
    plant(next(tmp_path.rglob(pattern)), sign, kind)
    main(argv)
    assert not sign.exists()


def test_no_tag_of_yaml_is_executed(capsys, tmp_path, sign):
    (tmp_path / "settings.yml").write_text(f"exp_id: !!python/object/apply:os.mkdir ['{sign}']\n")
    assert "exp_id must be one value" in error_of(capsys, "--config", tmp_path / "settings.yml")
    assert not sign.exists()


def test_no_code_of_a_checkpoint_is_executed(tiny_classifier, tmp_path, sign):
    """Neither is the user asked whether it may be."""
    folder = tmp_path / "classifier"
    shutil.copytree(tiny_classifier, folder)
    (folder / "theirs.py").write_text(f"import os\nos.mkdir({str(sign)!r})\nclass Theirs: pass\n")
    for name, key in (
        ("config.json", "AutoModelForImageClassification"),
        ("config.json", "AutoConfig"),
        ("preprocessor_config.json", "AutoImageProcessor"),
    ):
        told = json.loads((folder / name).read_text())
        told.setdefault("auto_map", {})[key] = "theirs.Theirs"
        told["model_type" if name == "config.json" else "image_processor_type"] = "theirs"
        told.pop("architectures", None)
        (folder / name).write_text(json.dumps(told))
    for load in (load_labels, lambda name: load_classifier(name, "cpu")):
        with pytest.raises(UserError, match="cannot open"):
            load(str(folder))
    assert not sign.exists()


@pytest.mark.parametrize(
    "scheduler", ["os", "StableDiffusionPipeline", "utils", "no_such", "AutoencoderKL"]
)
def test_a_scheduler_is_a_scheduler(capsys, tiny_config, tmp_path, scheduler):
    model = tmp_path / "model"
    shutil.copytree(tiny_config.model, model)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(
        json.dumps({**index, "scheduler": ["diffusers", scheduler]})
    )
    line = error_of(capsys, *flags(tiny_config, model=model, class_index=3, train=True))
    assert f"names the scheduler '{scheduler}', but the supported ones are" in line


@pytest.fixture(scope="module")
def hostile_classifier(tmp_path_factory) -> str:
    return save_classifier(tmp_path_factory.mktemp("hostile") / "vit", HOSTILE)


def test_no_label_leaves_its_folder_or_its_line(tiny_config, hostile_classifier, tmp_path, capsys):
    """Every class is trained, judged and reported; all that is written lies where it should."""
    out = tmp_path / "deep" / "er" / "out"
    config = RunConfig(model=tiny_config.model, classifier=hostile_classifier, output_path=str(out))
    short = ",".join(str(i + 1) for i, label in enumerate(HOSTILE) if len(label) < 15)
    argv = flags(
        config,
        "--class_index",
        train=True,
        evaluate=True,
        num_train_epochs=1,
        number_of_prompts=1,
        test_size=1,
        classes_at_once=4,
    )
    assert main([*argv, short]) == 0
    said = capsys.readouterr()
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f]|\x1b\]", said.out + said.err)
    assert {
        path.relative_to(tmp_path).parts[:3] for path in tmp_path.rglob("*") if path.is_file()
    } == {("deep", "er", "out")}
    for path in out.rglob("*"):
        assert path.resolve().is_relative_to(out) and re.fullmatch(r"[\w.-]+", path.name)
    assert "the prompt has" in error_of(capsys, *argv, str(HOSTILE.index("x" * 300) + 1))


def test_hostile_names_are_plain_folders():
    folders = [class_folder(i, class_name(label)) for i, label in enumerate(HOSTILE, 1)]
    assert len(set(folders)) == len(HOSTILE) and all(
        re.fullmatch(r"\d{4}(_[a-z0-9_]+)?", name) for name in folders
    )
    assert max(map(len, folders)) <= 85
    for name in ("..", "../..", "/", "a/../..", "timm:../../x", "x" * 500, "~/.ssh"):
        assert re.fullmatch(r"[\w-][\w.-]{0,79}", folder_name(name))


def test_a_lock_is_not_written_through_a_link(tiny_config, tmp_path, capsys):
    argv = flags(tiny_config, class_index=3, train=True, num_train_epochs=1)
    assert main(argv) == 0
    (lock,) = tmp_path.rglob(".demo.lock")
    (tmp_path / "keys").write_text("secret " * 999)
    lock.unlink()
    lock.symlink_to(tmp_path / "keys")
    assert "demo.lock' is a link" in error_of(capsys, *argv, "--skip_exists", "False")
    assert (tmp_path / "keys").read_text() == "secret " * 999


def test_a_report_reads_nothing_outside_its_run(tiny_config, tmp_path):
    argv = flags(tiny_config, class_index=3, evaluate=True)
    assert main([*argv, "--train", "True", "--num_train_epochs", "1"]) == 0
    (metrics,) = tmp_path.rglob("metrics.json")
    secret = tmp_path / "private"
    (secret / "updates").mkdir(parents=True)
    shutil.copy(metrics.parent / "with/0.png", secret / "0.png")
    (secret / "config.yml").write_text("password: 12345\n")
    told = json.loads(metrics.read_text())
    metrics.write_text(
        json.dumps(
            {
                **told,
                "film": [str(secret), f"updates/../../../../../../../{secret}"],
                "real": [str(secret / "0.png")],
                "token_folder": str(secret),
            }
        )
    )
    page = tmp_path / "page.html"
    assert report.main([str(metrics.parent.parent), "--out", str(page)]) == 0
    assert (
        "12345" not in page.read_text()
        and "image/gif" not in page.read_text()
        and ">real<" not in page.read_text()
    )


@pytest.mark.parametrize(
    "header",
    [
        {"seed": "none"},
        {"seed": "9" * 5000},
        {"seed": "\x1b]0;owned\x07"},
        {"classifier": "~nobody/x"},
        {"classifier": "\x1b]0;owned\x07\n"},
    ],
)
def test_a_foreign_header_is_one_plain_line(capsys, tiny_config, tmp_path, header):
    argv = flags(tiny_config, class_index=3)
    assert main([*argv, "--train", "True", "--num_train_epochs", "1"]) == 0
    token = next(tmp_path.rglob("learned_embeds.safetensors"))
    placeholder, vectors, widths, before = load_token(token)
    save_token(token, placeholder, vectors, widths, {**before, **header})
    line = error_of(capsys, *argv, "--evaluate", "True")
    assert "learned_embeds.safetensors" in line and line.isprintable() and len(line) < 700


@pytest.mark.parametrize("channels, width", [(9, 32), (4, 48)])
def test_a_generator_of_another_kind(capsys, tiny_config, tmp_path, channels, width):
    """Inpainting's UNet, or one that hears another text encoder."""
    model = tmp_path / "model"
    shutil.copytree(tiny_config.model, model)
    shutil.rmtree(model / "unet")
    UNet2DConditionModel(
        sample_size=4,
        in_channels=channels,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(model / "unet")
    line = error_of(capsys, *flags(tiny_config, model=model, class_index=3, train=True))
    assert (
        f"its UNet reads {channels} channels, predicts 4 channels and reads embeddings of {width}"
        in line
    )


class Page(html.parser.HTMLParser):
    """The elements of a page, and what stands in its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]


@pytest.fixture
def hostile_report(tiny_config, tmp_path) -> Path:
    """A page with a script as a label, in an evaluation prompt, in the header of a token and in its
    settings.
    """
    folder, script = (
        tmp_path / "vit",
        "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>",
    )
    shutil.copytree(tiny_config.classifier, folder)
    told = json.loads((folder / "config.json").read_text())
    told["id2label"] = {
        i: script if label == LABELS[2] else label for i, label in enumerate(LABELS)
    }
    (folder / "config.json").write_text(json.dumps(told))
    (tmp_path / "names.yml").write_text("3: tiger cat\n")
    argv = flags(
        tiny_config,
        classifier=folder,
        class_names=tmp_path / "names.yml",
        evaluate=True,
        class_index=3,
        eval_prompts="{} <script>x</script>",
    )
    assert main([*argv, "--train", "True", "--num_train_epochs", "1"]) == 0
    token = next(tmp_path.rglob("learned_embeds.safetensors"))
    placeholder, vectors, _, header = load_token(token)
    save_file({placeholder: vectors}, token, {**header, "label": script, "<marquee>": script})
    assert main(argv) == 0
    return next(tmp_path.rglob("report.html"))


def test_a_report_shows_a_script_and_does_not_run_it(hostile_report):
    text = hostile_report.read_text()
    page = Page(text)
    assert "script" not in page.tags and "marquee" not in page.tags
    assert not any(name.startswith("on") for name in page.attributes)
    assert text.count("&lt;script&gt;document.title") >= 4


BROWSER = [
    shutil.which("chromium") or "",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--dump-dom",
]


@pytest.mark.skipif(not BROWSER[0], reason="no chromium here")
def test_a_browser_shows_a_script_and_does_not_run_it(hostile_report, tmp_path):
    """Not even where a string was forgotten; without that rule the same script would run."""
    text = hostile_report.read_text()
    forgotten = (
        text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&#39;", "'")
        .replace("alert(1)", "0")
    )
    rule = re.search('<meta http-equiv="Content-Security-Policy"[^>]*>', text)[0]
    titles = []
    for i, page in enumerate([text, forgotten, forgotten.replace(rule, "")]):
        (tmp_path / f"{i}.html").write_text(page)
        done = subprocess.run(
            [*BROWSER, f"--user-data-dir={tmp_path}/browser{i}", f"file://{tmp_path}/{i}.html"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        titles.append(re.search("<title>(.*?)</title>", done.stdout)[1])
    assert titles == ["Discriminative class tokens", "Discriminative class tokens", "owned"]


def test_no_secret_is_written_or_printed(tiny_config, tmp_path):
    """The hub's token, from the environment or where `hf auth login` leaves it."""
    secret, home = "hf_" + "sEcReT" * 6, tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(secret)
    out = tmp_path / "out"
    argv = flags(
        RunConfig(model=tiny_config.model, classifier=tiny_config.classifier, output_path=str(out)),
        class_index=3,
        train=True,
        evaluate=True,
        num_train_epochs=1,
    )
    environment = {
        **os.environ,
        "HF_TOKEN": secret,
        "HUGGING_FACE_HUB_TOKEN": secret,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
    }
    calls = [
        [*argv, *more]
        for more in (
            [],
            ["--model", "nobody/private", "--exp_id", "other"],
            ["--lr", "0", "--debug"],
        )
    ]
    code = "import json, sys, run; print([run.main(argv) for argv in json.loads(sys.argv[1])])"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(calls)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert (
        done.stdout.splitlines()[-1] == "[0, 2, 2]"
        and "cannot open 'nobody/private'" in done.stderr
    )
    assert secret not in done.stdout + done.stderr
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 10 and not any(secret.encode() in path.read_bytes() for path in files)
    assert socket.gethostname() not in next(out.rglob("config.yml")).read_text()
