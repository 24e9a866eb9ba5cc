"""What export.py writes: files that other tools read, a card that the Hub reads, all of it or
nothing.
"""

import ast
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from evaluation.files import RunFiles
from evaluation.metrics import Judgement
from evaluation.statistics import count_right
from export import main
from models.hub import is_hub_id
from run import main as run
from system.tensor_files import save_image
from tests.conftest import flags
from tests.models.pipelines import as_pipeline
from tokens.class_token import load_token, save_token
from tokens.export import name_token
from tokens.model_card import TAGS, escape_text, hide_folders
from utils import write_json, write_yaml

HEADER = {
    "class_index": "283",
    "class_name": "tiger cat",
    "label": "tiger cat, Felis tigris",
    "updates": "7",
    "base_model": "CompVis/stable-diffusion-v1-4",
}


def make_run(
    root: Path,
    path: str = "inet/0283_tiger_cat/demo",
    placeholder: str = "newclas",
    count: int = 1,
    widths: tuple[int, ...] = (32,),
    evaluated: bool = True,
    **header,
) -> RunFiles:
    """A finished run's folders with a random token, two pictures per condition
    and what judges see in them.
    """
    files = RunFiles(root / "img" / path)
    header = HEADER | header
    vectors = torch.randn(count, sum(widths), generator=torch.Generator().manual_seed(count))
    save_token(files.token_file, placeholder, vectors, widths, header)
    files.images.mkdir(parents=True)
    if evaluated:
        conditions = {}
        for condition, right in (("without", [False, False]), ("with", [True, False])):
            seen = asdict(
                Judgement(
                    count_right(right), count_right(right), 0.5, {"281 (tabby | cat)": 2}, right
                )
            )
            conditions[condition] = {"classifier": seen, "evaluator": seen}
            for seed in range(2):
                save_image(
                    Image.new("RGB", (64, 64), (200, 90 * seed, 0)),
                    files.eval_images / condition / f"{seed}.png",
                )
        write_json(
            files.metrics_file,
            {
                "class_index": 283,
                "label": header["label"],
                "classes": 5,
                "images": 2,
                "contexts": {},
                "pictures": "",
                "judges": {"classifier": "inet", "evaluator": "mine"},
                "evaluation": "",
                "film": [],
                "held_out": True,
                "settings": {"classifier": "inet", "evaluator": "timm:local-dir:/home/me/mine"},
                **conditions,
            },
        )
        write_yaml(
            files.config_file,
            {
                "lr": 0.005,
                "class_index": "283",
                "output_path": "/home/me/out",
                "real_images": "/home/me/real",
                "model": "/home/me/sd",
                "betas": [0.9, 0.999],
            },
        )
    return files


def read_file(path: Path) -> tuple[dict, dict]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def read_files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def error_of(capsys, *argv) -> str:
    capsys.readouterr()
    assert main([str(part) for part in argv]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def vectors_in(pipe, word: str) -> torch.Tensor:
    ids = pipe.tokenizer(
        pipe.maybe_convert_prompt(word, pipe.tokenizer), add_special_tokens=False
    ).input_ids
    return pipe.text_encoder.get_input_embeddings().weight[ids].detach()


def load_by_card(folder: Path, pipe):
    """Run the loop of the card's code, which loads every token into `pipe`."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (loop,) = (node for node in ast.parse(code).body if isinstance(node, ast.For))
    exec(ast.unparse(loop), {"pipe": pipe, "folder": folder, "load_file": load_file})


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("room", ["img", "pipeline_token"])
def test_file_of_one_text_encoder(tmp_path, count, room):
    files = make_run(tmp_path, count=count, evaluated=False)
    assert (
        main(
            [
                str(files.images if room == "img" else files.tokens),
                "--to",
                str(tmp_path / "new/out"),
            ]
        )
        == 0
    )
    assert list(read_files(tmp_path / "new/out")) == ["newclas-0283_tiger_cat.safetensors"]
    path, ours = (
        tmp_path / "new/out/newclas-0283_tiger_cat.safetensors",
        load_token(files.token_file),
    )
    tensors, header = read_file(path)
    assert list(tensors) == ["emb_params"] and tensors["emb_params"].dtype == torch.float32
    assert tensors["emb_params"].shape == (count, 32) and torch.equal(
        tensors["emb_params"], ours.vectors
    )
    assert header == {**HEADER, "format": "pt", "placeholder": "newclas"}
    token = load_token(path)
    assert (
        token.placeholder == "newclas"
        and torch.equal(token.vectors, ours.vectors)
        and token.widths == (32,)
    )


@pytest.mark.parametrize("count", [1, 3])
def test_file_of_two_text_encoders(tmp_path, count):
    files = make_run(tmp_path, widths=(32, 48), count=count, evaluated=False)
    assert main([str(files.images), "--to", str(tmp_path / "out")]) == 0
    tensors, header = read_file(tmp_path / "out/newclas-0283_tiger_cat.safetensors")
    ours = load_token(files.token_file).vectors
    assert sorted(tensors) == ["clip_g", "clip_l"] and header == {
        **HEADER,
        "format": "pt",
        "placeholder": "newclas",
    }
    assert torch.equal(tensors["clip_l"], ours[:, :32]) and torch.equal(
        tensors["clip_g"], ours[:, 32:]
    )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("placeholder", ["newclas", "<New-Clas>"])
def test_diffusers_reads_every_file(tmp_path, generator, count, placeholder):
    """The card's own code loads the gallery; the other layout gives the same vectors."""
    make_run(tmp_path, placeholder=placeholder, count=count)
    make_run(tmp_path, "inet/0007_jaguar/demo", placeholder, count, class_name="jaguar")
    assert (
        main(
            [
                *map(str, (tmp_path / "img").glob("*/*/demo")),
                "--to",
                str(tmp_path / "out"),
                "--card",
            ]
        )
        == 0
    )
    pipe = as_pipeline(generator, DDIMScheduler())
    load_by_card(tmp_path / "out", pipe)
    for i, name in enumerate(
        sorted(path.stem for path in (tmp_path / "out").glob("*.safetensors"))
    ):
        ours = load_token(tmp_path / "out" / f"{name}.safetensors").vectors
        assert torch.equal(vectors_in(pipe, f"<{name.lower()}>"), ours)
        pipe.load_textual_inversion(
            str(tmp_path / "out" / f"{name}.safetensors"), token=f"<again{i}>"
        )
        assert torch.equal(vectors_in(pipe, f"<again{i}>"), ours)


@pytest.mark.parametrize(
    "placeholder, folder, name",
    [
        ("newclas", "0283_tiger_cat", "newclas-0283_tiger_cat"),
        ("<cat-toy>", "0001_crane", "cat-toy-0001_crane"),
        ("../a/b", "0001_crane", "ab-0001_crane"),
        ("猫", "0001_crane", "0001_crane"),
        ("a\0b", "1", "ab-1"),
        ("x" * 1000, "0001", "x" * 100 + "-0001"),
        ("-rf", "0001_crane", "rf-0001_crane"),
    ],
)
def test_names_are_fit_for_files(placeholder, folder, name):
    assert name_token(placeholder, folder) == name


@pytest.mark.parametrize(
    "other, placeholder",
    [
        ("inet/0283_tiger_cat/other", "newclas"),
        ("cub/0283_tiger_cat/demo", "<newclas>"),
        ("cub/0283_tiger_cat/demo", "Newclas"),
    ],
)
def test_two_tokens_of_one_name_are_refused(tmp_path, capsys, other, placeholder):
    one, two = make_run(tmp_path), make_run(tmp_path, other, placeholder)
    line = error_of(capsys, one.images, two.images, "--to", tmp_path / "out")
    assert str(one.images) in line and str(two.images) in line and not (tmp_path / "out").exists()
    assert (
        main([str(one.images), str(one.tokens), f"{one.images}/", "--to", str(tmp_path / "out")])
        == 0
    )  # one run


@pytest.mark.parametrize(
    "broken, more, reason",
    [
        (lambda files: files.token_file.unlink(), [], "holds no token: give folders such as"),
        (lambda files: files.token_file.write_bytes(b""), [], "it is empty"),
        (
            lambda files: files.metrics_file.unlink(),
            ["--card"],
            "holds no evaluation.*--evaluate True",
        ),
        (lambda files: files.metrics_file.write_text("{}"), ["--card"], "is broken"),
        (lambda files: (files.eval_images / "with/1.png").unlink(), ["--card"], "1.png"),
        (lambda files: files.config_file.write_text("a: b: c"), ["--card"], "is not YAML"),
    ],
)
def test_what_is_missing_is_one_line_and_nothing_is_written(tmp_path, capsys, broken, more, reason):
    whole, half = make_run(tmp_path), make_run(tmp_path, "inet/0007_jaguar/demo")
    broken(half)
    assert re.search(
        reason, error_of(capsys, whole.images, half.images, "--to", tmp_path / "out", *more)
    )
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_wrong_folders_are_refused(tmp_path, capsys):
    files = make_run(tmp_path)
    for wrong in (files.images.parent, files.eval_images, files.token_file, tmp_path, Path("/")):
        assert "is not a run's folder" in error_of(capsys, wrong, "--to", tmp_path / "out")
    assert "--to takes a folder" in error_of(capsys, files.images, "--to", files.token_file)


def test_nothing_of_others_is_replaced(tmp_path, capsys):
    """A page, a file in the way, and a token that the card would not show."""
    files, name = make_run(tmp_path), "newclas-0283_tiger_cat"
    for number, (path, reason) in enumerate(
        (
            ("README.md", "is not a model card written by this program"),
            (name, "is in the way"),
            ("other.safetensors", "holds other tokens too (other)"),
        )
    ):
        out = tmp_path / str(number)
        out.mkdir()
        (out / path).write_text("mine")
        assert reason in error_of(capsys, files.images, "--to", out, "--card")
        assert read_files(out) == {path: b"mine"}


def test_gallery(tmp_path):
    one = make_run(tmp_path)
    make_run(
        tmp_path,
        "inet/0007_jaguar/demo",
        widths=(32, 48),
        class_name="jaguar",
        base_model="stabilityai/sdxl",
    )
    make_run(
        tmp_path, "inet/0009_crane/demo", class_name="crane", base_model="/home/me/models/mine"
    )
    real = one.eval_images / "real/0.png"
    save_image(Image.new("RGB", (64, 64), (1, 2, 255)), real)
    argv = [
        *map(str, sorted((tmp_path / "img").glob("*/*/demo"))),
        "--to",
        str(tmp_path / "out"),
        "--card",
    ]
    assert main(argv) == 0
    before = read_files(tmp_path / "out")
    names = ["newclas-0007_jaguar", "newclas-0009_crane", "newclas-0283_tiger_cat"]
    assert sorted(before) == sorted(
        [
            "README.md",
            *(f"{name}.safetensors" for name in names),
            *(
                f"{name}/{file}"
                for name in names
                for file in ("learned_embeds.safetensors", "pictures.png")
            ),
        ]
    )
    assert before[f"{names[2]}/learned_embeds.safetensors"] == one.token_file.read_bytes()
    assert main(argv) == 0 and read_files(tmp_path / "out") == before
    assert (1, 2, 255) not in {
        color
        for _, color in Image.open(tmp_path / "out" / names[2] / "pictures.png").getcolors(2**24)
    }  # a real picture may be another's
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.to_dict() == {
        "base_model": ["CompVis/stable-diffusion-v1-4", "stabilityai/sdxl"],
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [*TAGS, "stable-diffusion-xl"],
    }
    for text in (
        (
            "`embedding:newclas-0283_tiger_cat tiger cat` | `newclas-0283_tiger_cat tiger cat` | "
            "`<newclas-0283_tiger_cat> tiger cat` |"
        ),
        "](newclas-0283_tiger_cat/pictures.png)",
        (
            "the classifier that trained the token, `google/vit-large-patch16-224` | "
            "`0.00 [0.00, 0.66]` | `0.50 [0.09, 0.91]` |"
        ),
        "| the evaluator, `timm:local-dir:mine` |",
        "License:** none is chosen",
        "<pre>\nlr: 0.005\nmodel: sd\nbetas: 0.9 0.999\n</pre>",
        '"mine"',
    ):
        assert text in card.text
    assert "/home/me" not in card.text and b"/home/me" not in b"".join(before.values())
    for code in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        compile(code, "card", "exec")


class PairLoader:
    """Stands for SDXL's pipeline: keeps what it is given."""

    text_encoder, tokenizer, text_encoder_2, tokenizer_2 = "L", "l", "G", "g"

    def __init__(self):
        self.loaded = []

    def load_textual_inversion(self, vectors, token, text_encoder, tokenizer):
        self.loaded.append((token, vectors.shape[1], text_encoder, tokenizer))


def test_the_card_s_code_loads_a_pair(tmp_path):
    files = make_run(tmp_path, widths=(32, 48))
    assert main([str(files.images), "--to", str(tmp_path / "out"), "--card"]) == 0
    pipe = PairLoader()
    load_by_card(tmp_path / "out", pipe)
    assert pipe.loaded == [
        ("<newclas-0283_tiger_cat>", 32, "L", "l"),
        ("<newclas-0283_tiger_cat>", 48, "G", "g"),
    ]


HOSTILE = (
    "<script>alert(1)</script> | `x` ``` **b** [a](javascript:x) </pre>\n\n# head\n---\nlicense:"
    " mit {{ 7*7 }}"
)


def test_words_from_elsewhere_are_text(tmp_path):
    """No word of a header or metrics.json changes the card's structure or its metadata."""
    cards = []
    for i, word in enumerate(("plain", HOSTILE)):
        files = make_run(
            tmp_path / str(i),
            placeholder=f"newclas{word}",
            label=word,
            class_name=word,
            base_model=word,
            updates=word,
        )
        metrics = json.loads(files.metrics_file.read_text())
        metrics["settings"] |= {"classifier": word, "evaluator": word}
        files.metrics_file.write_text(json.dumps(metrics))
        write_yaml(files.config_file, {"model": word})
        assert main([str(files.images), "--to", str(tmp_path / str(i) / "out"), "--card"]) == 0
        cards.append((tmp_path / str(i) / "out/README.md").read_text())
    plain, hostile = cards
    assert (
        ModelCard(hostile).data.to_dict()
        == ModelCard(plain).data.to_dict()
        == {
            "library_name": "diffusers",
            "pipeline_tag": "text-to-image",
            "tags": TAGS,
        }
    )
    assert list_structure(hostile) == list_structure(plain) and "{{ 7*7 }}" in hostile
    for code in re.findall(r"^```python\n(.*?)^```", hostile, re.DOTALL | re.MULTILINE):
        compile(code, "card", "exec")


def list_structure(card: str) -> list[str]:
    """The kinds of a card's blocks and inline parts by a Markdown parser, its HTML without what
    <pre> holds.
    """
    kinds = []
    parser = pytest.importorskip("markdown_it").MarkdownIt(
        "gfm-like", {"html": True, "linkify": False}
    )
    for block in parser.parse(card.split("---\n", 2)[2]):
        parts = [part for part in block.children or [] if part.type != "text"]
        kinds += [block.type] + [
            part.content if "html" in part.type else part.type for part in parts
        ]
        kinds += [re.sub(r"(?s)(?<=<pre>).*?(?=</pre>)", "", block.content)] * (
            block.type == "html_block"
        )
    return [
        kind.replace("<code>", "code_inline")
        for kind in kinds
        if kind not in ("</code>", "softbreak")
    ]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("tiger cat, Felis", "tiger cat, Felis"),
        ("a|b", "a&#124;b"),
        ("<b>", "&#60;b&#62;"),
        ("a\nb", "a b"),
        ("_x_", "&#95;x&#95;"),
        ("a&lt;", "a&#38;lt&#59;"),
        ("é", "é"),
        (3, "3"),
    ],
)
def test_escape_text(text, shown):
    assert escape_text(text) == shown


@pytest.mark.parametrize(
    "text, shown",
    [
        ("/home/me/vit/", "vit"),
        ("mean:/home/me/vit", "mean:vit"),
        ("timm:local-dir:~/x/vit", "timm:local-dir:vit"),
        ("$DATA/vit", "vit"),
        ("../me/vit", "vit"),
        ("google/vit", "google/vit"),
        ("miniature/weights/generator",) * 2,
        ("timm:resnet50", "timm:resnet50"),
        ("0.5", "0.5"),
        ("/", ""),
    ],
)
def test_hide_folders(text, shown):
    assert hide_folders(text) == shown


@pytest.mark.parametrize(
    "name, known",
    [
        ("CompVis/stable-diffusion-v1-4", True),
        ("sdxl", False),
        ("./sd", False),
        ("a/b/c", False),
        ("a/b c", False),
        ("miniature/weights", False),
        ("a/b\n", False),
        ("", False),
        ("ä/b", False),
    ],
)
def test_is_hub_id(name, known):
    assert is_hub_id(name) is known


def test_a_real_run(tiny_config, tmp_path):
    assert (
        run(flags(tiny_config, class_index="3,5", train=True, evaluate=True, num_train_epochs=1))
        == 0
    )
    folders = [str(path) for path in (tmp_path / "img").glob("*/*/demo")]
    assert main([*folders, "--to", str(tmp_path / "out"), "--card"]) == 0
    card = ModelCard.load(tmp_path / "out/README.md")
    assert "tiger cat" in card.text and "`<newclas-0005_7_8_odd> 7/8: odd`" in card.text
    assert "base_model" not in card.data.to_dict() and str(tmp_path) not in card.text
    (settings,) = re.findall(
        r"<pre>\n(.*?)</pre>", card.text, re.DOTALL
    )  # the same for both classes
    assert "model: stable-diffusion\n" in settings and "lr: 0.00125\n" in settings
