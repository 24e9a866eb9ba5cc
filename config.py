"""Every setting, declared once: its default in the paper's setting, its help, what it may be and
what it decides.

Edit a default here, put it in a YAML file (`--config`), or give it as a flag; flags override the
file.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field, fields
from types import NoneType
from typing import Any, get_args, get_origin

from system.paths import check_output_path
from utils import FUNCTION, TOKEN_SUFFIXES, import_function, require

Check = tuple[Callable[[Any], bool], str]  # whether a value can work, and the same in words
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
SEEDS = 2**32  # how many torch tells apart: seed 2**32 draws what seed 0 draws


def setting(
    default,
    text: str,
    check: Check | None = None,
    decides: str = "",
    path: bool | Callable[[str], bool] = False,
    topic: str = "",
):
    """A field of RunConfig; `decides`: 'token', 'pictures', both, or nothing but speed, memory and
    output; `path`: whether it is a path, or what tells so of its words; `topic`: of this and the
    next settings, a heading of --help.
    """
    start = (
        {"default_factory": lambda: list(default)}
        if isinstance(default, list)
        else {"default": default}
    )
    return field(
        **start,
        metadata={
            "help": text,
            "check": check,
            "decides": decides.split(),
            "path": path,
            "topic": topic,
        },
    )


def from_to(low: float, high: float) -> Check:
    return lambda value: low <= value <= high, f"from {low} to {high:,}"


def greater_than(low: float, high: float) -> Check:
    return lambda value: low < value <= high, f"greater than {low}, {high:,} at most"


def one_of(*choices: str) -> Check:
    return lambda value: value in choices, f"{', '.join(choices[:-1])} or {choices[-1]}"


NAMES_IN_FILES = (
    "__metadata__",
    "clip_l",
    "clip_g",
    "emb_params",
    "*",
)  # where a placeholder could stand


def word_such_as(example: str) -> Check:
    return (
        lambda value: (
            0 < len(value) <= 50 and not set(value) & set(" {}") and value not in NAMES_IN_FILES
        ),
        f"one word of 50 letters at most, without spaces, such as {example}",
    )


def is_folder_name(name: str) -> bool:
    return 0 < len(name.encode()) <= 100 and name.strip(". ") == name and not set(name) & set("/\\")


GIVEN = (lambda value: bool(value.strip()), "a name or a folder (--help shows which)")
SIDE = (
    lambda value: 8 <= value <= 8192 and value % 8 == 0,
    "divisible by 8, for the VAE, and from 8 to 8,192",
)


@dataclass
class RunConfig:
    """The reference setting of Discriminative Class Tokens (ICCV 2023): Stable Diffusion 1.4 on a
    CUDA GPU.
    """

    class_index: str = setting(
        "",
        "Which classes: a number counted from 1 (283), a range (1-12), a list (1,5,9), 'all', or a"
        " name ('tiger cat'). --list_classes shows them.",
        topic="What to learn",
    )
    train: bool = setting(False, "Learn a token for each class.")
    evaluate: bool = setting(
        False, "Draw the same seeds without and with the token, and judge them."
    )
    estimate: bool = setting(
        False,
        "Only print what training would take: parameters, memory by batch_size, FLOPs, disk. Reads"
        " configs, no weights, writes nothing, needs no class and no GPU.",
    )
    memory_gb: float | None = setting(
        None,
        "With estimate: a card's memory in GB, to be told which batch_size fits.",
        greater_than(0, 10_000),
    )
    exp_id: str = setting(
        "demo",
        "The name of the run: the last folder of every output.",
        (
            is_folder_name,
            (
                "a folder's name of 100 bytes at most, without / or \\, without a dot or space at"
                " its ends"
            ),
        ),
    )
    class_names: str | None = setting(
        None,
        "A YAML file {number: name} of names to use in prompts instead of the classifier's own,"
        " such as {135: crane bird}.",
        GIVEN,
        "token",
        path=True,
    )
    placeholder_token: str = setting(
        "newclas", "The token's word in prompts.", word_such_as("newclas"), "token"
    )
    initializer_token: str = setting(
        "a",
        "What the token's vectors start from: a word, a phrase (its tokens in turn), or a token"
        " file to continue.",
        (
            lambda text: text.strip() and ("/" not in text or text.endswith(TOKEN_SUFFIXES)),
            f"a word, a phrase or a token file ({', '.join(TOKEN_SUFFIXES)})",
        ),
        "token",
        lambda text: text.endswith(TOKEN_SUFFIXES),
    )
    num_vectors: int | None = setting(
        None,
        "The vectors of the token; the phrase repeats to fill them. 'none': as many as the"
        " initialiser has.",
        from_to(1, 64),
        "token",
    )
    model: str = setting(
        "CompVis/stable-diffusion-v1-4",
        "The generator: a hub id or folder of Stable Diffusion 1, 2 or XL, or a model "
        "distilled from one.",
        GIVEN,
        "token pictures",
        path=True,
        topic="Generator",
    )
    height: int = setting(512, "Image height in pixels, divisible by 8.", SIDE, "token pictures")
    width: int = setting(512, "Image width in pixels, divisible by 8.", SIDE, "token pictures")
    num_inference_steps: int = setting(
        30, "Steps of the checkpoint's scheduler.", from_to(1, 999), "token pictures"
    )
    guidance_scale: float = setting(
        7.0, "Classifier-free guidance; none at 1 or less.", from_to(0, 100), "token pictures"
    )
    guidance_rescale: float = setting(
        0.0,
        "How far guided noise is scaled back to unguided noise's variance, for zero-terminal-SNR"
        " models (0.7).",
        from_to(0, 1),
        "token pictures",
    )
    mixed_precision: str = setting(
        "fp16",
        "Precision of the frozen generator: no, fp16 or bf16. The token and the classifiers are"
        " always float32.",
        one_of("no", "fp16", "bf16"),
        "token pictures",
    )
    classifier: str = setting(
        "inet",
        "The guiding classifier: inet, inat, cub, miniature, miniature_evaluator, a transformers"
        " image classifier (hub id or folder), timm:<name>, or zero-shot:<hub id or folder of CLIP"
        " or SigLIP>.",
        GIVEN,
        "token",
        path=True,
        topic="Classifier",
    )
    labels: str | None = setting(
        None,
        "The classes of zero-shot classifiers: a text file with one label per line.",
        GIVEN,
        "token",
        path=True,
    )
    loss: str = setting(
        "cross_entropy",
        "What images are scored by: cross_entropy, norm_penalty (which also keeps the vectors' norm"
        " near the vocabulary's), or module:function of images [B, 3, H, W] in [0, 1] and targets"
        " [B] -> losses [B].",
        (
            lambda name: re.fullmatch(rf"\w+|{FUNCTION}", name) is not None,
            "a loss's name or module:function",
        ),
        "token",
    )
    evaluator: str | None = setting(
        None,
        "A second classifier that judges and never guides (the same choices). 'none': only the"
        " guiding one judges.",
        GIVEN,
        path=True,
    )
    num_train_epochs: int = setting(
        50, "Updates at most.", from_to(1, 100_000), "token", topic="Training loop"
    )
    epoch_size: int = setting(5, "Images per update.", from_to(1, 10_000), "token")
    number_of_prompts: int = setting(
        3, "How many of the paper's prompt templates take turns.", from_to(1, 3), "token"
    )
    lr: float = setting(
        1.25e-3, "AdamW's learning rate (0.00025 x 5 images).", greater_than(0, 1000), "token"
    )
    betas: list[float] = setting(
        [0.9, 0.999],
        "AdamW's betas.",
        (
            lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
            "two numbers in [0, 1), such as 0.9 0.999",
        ),
        "token",
    )
    weight_decay: float = setting(
        1e-2, "AdamW's weight decay, on the trained vector.", from_to(0, 1000), "token"
    )
    eps: float = setting(1e-8, "AdamW's epsilon.", greater_than(0, 1), "token")
    max_grad_norm: float = setting(
        1.0, "The gradient's norm is clipped to this.", greater_than(0, 10**9), "token"
    )
    seed: int = setting(
        35,
        "Seed of the first training image; the next ones count up. Evaluation uses 0 to test_size -"
        " 1, so this must not be below test_size.",
        from_to(0, SEEDS - 1),
        "token",
    )
    fresh_noise: bool = setting(
        False, "New noise in every update instead of the paper's same seeds.", None, "token"
    )
    train_timesteps: list[int] | None = setting(
        None,
        "Timesteps of the training trajectory, such as 999 800 600; it jumps from the last one to"
        " z_0. 'none': the checkpoint's own scheduler, as in the paper.",
        (
            lambda steps: (
                steps
                and None not in steps
                and steps == sorted(set(steps), reverse=True)
                and steps[-1] >= 0
                and steps[0] <= 999
            ),
            "falling numbers from 999 to 0, from noise to image, such as 999 800 600",
        ),
        "token",
    )
    train_guidance_scale: float | None = setting(
        None,
        "Guidance in training: 1 learns without, at half the UNet's work. 'none': as"
        " guidance_scale.",
        from_to(0, 100),
        "token",
    )
    target_accuracy: float = setting(
        0.7,
        "Stop when more than this share of an update's images is classified right; with fresh"
        " noise, of the last three updates' images.",
        from_to(0, 1),
        "token",
    )
    early_stopping: int = setting(
        15, "Updates without a better loss until it stops.", from_to(1, 100_000), "token"
    )
    test_size: int = setting(
        10,
        "Evaluation images per class, each without and with the token.",
        from_to(1, 100_000),
        topic="Evaluation",
    )
    token: str | None = setting(
        None,
        "Evaluate this token file, of any tool, instead of a trained one; it is copied into the"
        " run.",
        GIVEN,
        path=True,
    )
    eval_prompts: list[str] = setting(
        [],
        'More prompts to evaluate in, with {} for the class, such as "A painting of {}" "A photo of'
        ' a {} in the snow"; or a text file with one per line.',
        path=lambda text: "{}" not in text,
    )
    context_judge: str | None = setting(
        None,
        "module:function that says which words of a prompt a picture (PIL) shows, or None:"
        " eval_prompts are then judged by it too.",
        (lambda value: re.fullmatch(FUNCTION, value), "module:function"),
    )
    controls: bool = setting(
        False,
        "Evaluate an untrained and a random token of the same norm too: what they gain is not the"
        " training's.",
    )
    oracle_names: str | None = setting(
        None,
        "A YAML file {number: words} such as {135: wading bird}, which ask for each class without a"
        " token: drawn and judged as an arm of its own, what the generator can do if asked right.",
        GIVEN,
        path=True,
    )
    attention_maps: bool = setting(
        False,
        "Show where the token and the class name look in the first pictures (cross-attention), and"
        " which words of the vocabulary the token is nearest to, before and after.",
    )
    real_images: str | None = setting(
        None,
        "Real pictures, shown beside the generated ones and compared with them: a folder with one"
        " folder per class (0283_tiger_cat, 283, tiger cat or the label), or module:function of a"
        " label and a random.Random that draws one.",
        GIVEN,
        path=True,
    )
    features: str = setting(
        "inception",
        "What FID, KID and coverage compare, where real_images are given: inception,"
        " inception:<file of weights>, or a classifier's last features (the same choices as"
        " classifier).",
        GIVEN,
        path=True,
    )
    fid_mode: str = setting(
        "clean",
        "How InceptionV3's pictures are resized: as by torch-fidelity (legacy) or clean-fid"
        " (clean).",
        one_of("legacy", "clean"),
    )
    device: str = setting(
        "cuda",
        "cuda, cuda:1, mps or cpu.",
        (lambda value: re.fullmatch(r"cuda(:\d{1,3})?|mps|cpu", value), "cuda, cuda:1, mps or cpu"),
        topic="Machine and output",
    )
    batch_size: int | None = setting(
        None,
        "Images held in memory with a graph at once; changes speed and memory, not results. 'none':"
        " as many as fit.",
        from_to(1, 10_000),
    )
    classes_at_once: int = setting(
        1,
        "Classes that learn together in the same batches; changes speed and memory, not results.",
        from_to(1, 1000),
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the last step: slower, less memory."
    )
    torch_compile: bool = setting(
        False,
        "Compile the generator's networks: minutes at the start, and again for batches of other"
        " sizes, then faster; for long sweeps.",
    )
    output_path: str = setting(
        ".", "The folder that holds pipeline_token/ and img/.", GIVEN, path=True
    )
    report_to: str | None = setting(
        None,
        "Send curves and pictures of training to tensorboard (the folder tensorboard/), wandb,"
        " trackio, or all that are installed.",
        one_of("tensorboard", "wandb", "trackio", "all"),
    )
    train_images: str = setting(
        "all",
        "The training pictures that stay once a class is trained, 0.4 MB each at 512 x 512: all (of"
        " 50 updates 100 MB per class), film (of the ten updates at most that the report's film"
        " shows: 20 MB), or none.",
        one_of("all", "film", "none"),
    )
    skip_exists: bool = setting(
        True, "Skip what is finished and resume what is half done. False starts over."
    )

    def pick_settings(self, names: Iterable[str]) -> dict[str, Any]:
        """{setting: value} of some settings."""
        return {name: getattr(self, name) for name in names}

    def sampling_settings(self, training: bool = False) -> dict[str, Any]:
        """What SamplingSettings take, of training or of drawing."""
        settings = self.pick_settings(
            ("height", "width", "guidance_scale", "num_inference_steps", "guidance_rescale")
        )
        if training and self.train_guidance_scale is not None:
            settings["guidance_scale"] = self.train_guidance_scale
        return {
            **settings,
            "timesteps": tuple(self.train_timesteps) if training and self.train_timesteps else None,
        }

    def validate_settings(self):
        """Raise UserError for the first setting that cannot work, with its name, its value and what
        would be right.
        """
        require(
            self.estimate or self.class_index,
            "which class? give --class_index 283, 1-12, 1,5,9, all or a name; --list_classes shows"
            " the classes of the classifier",
        )
        for entry in SETTINGS.values():
            value, check, (_, _, is_optional) = (
                getattr(self, entry.name),
                entry.metadata["check"],
                value_type(entry),
            )
            for part in value if isinstance(value, list) else [value]:
                require(
                    not isinstance(part, str) or part.isprintable(),
                    f"{entry.name} {part!r} has unprintable characters",
                )
            require(
                check is None
                or value is None
                and is_optional
                or value is not None
                and check[0](value),
                f"{entry.name} must be {describe_values(entry)}, not {value!r}",
            )
        require(
            self.estimate or self.memory_gb is None,
            f"memory_gb {self.memory_gb} is for --estimate True",
        )
        images = self.epoch_size * (self.num_train_epochs if self.fresh_noise else 1)
        require(
            not self.train or self.seed >= self.test_size,
            f"seed {self.seed} would train on images that evaluation uses (seeds 0 to"
            f" {self.test_size - 1}): give --seed {self.test_size} or more, or --test_size"
            f" {self.seed} or less",
        )
        require(
            not self.train or self.seed + images <= SEEDS,
            f"seed {self.seed} is too high for {images} training images: there are {SEEDS} seeds,"
            f" after which evaluation's come back; give --seed {SEEDS - images} or less",
        )
        require(
            not (self.token and self.train),
            f"token '{self.token}' is only evaluated: leave --train True out "
            "(--initializer_token FILE continues a token)",
        )
        require(
            not (self.token and self.num_vectors),
            f"num_vectors {self.num_vectors}: '{self.token}' has its own "
            "number of vectors; leave it out",
        )
        self.check_labels()
        for name in ("context_judge", "loss"):
            if re.fullmatch(FUNCTION, getattr(self, name) or ""):
                import_function(getattr(self, name), name)
        check_output_path(self.output_path)

    def check_labels(self):
        """Raise UserError unless `labels` is given where, and only where, a zero-shot classifier
        needs it.
        """
        given = self.pick_settings(["classifier", "evaluator", "features"])
        asking = [
            f"{name} '{value}'"
            for name, value in given.items()
            if value and value.startswith("zero-shot:")
        ]
        require(
            self.labels or not asking,
            f"{' and '.join(asking)}: give --labels names.txt, a text file with one label per line",
        )
        require(
            asking or not self.labels,
            f"labels '{self.labels}' is for zero-shot:<hub id or folder of CLIP or SigLIP>: the"
            f" classifier '{self.classifier}' has labels of its own",
        )


SETTINGS = {entry.name: entry for entry in fields(RunConfig)}


def names_deciding(what: str) -> list[str]:
    """The settings that decide the 'token' or the 'pictures'."""
    return [name for name, entry in SETTINGS.items() if what in entry.metadata["decides"]]


def value_type(entry: Field) -> tuple[type, bool, bool]:
    """The type of one value of a setting, whether the setting is a list of them, and whether it may
    be None.
    """
    is_optional = NoneType in get_args(entry.type)
    kind = get_args(entry.type)[0] if is_optional else entry.type
    return (
        (get_args(kind)[0], True, is_optional)
        if get_origin(kind) is list
        else (kind, False, is_optional)
    )


def describe_values(entry: Field) -> str:
    check, (kind, _, is_optional) = entry.metadata["check"], value_type(entry)
    words = check[1] if check else {bool: "True or False"}.get(kind, f"of type {kind.__name__}")
    return words + ", or none" * is_optional
