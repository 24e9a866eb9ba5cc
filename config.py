"""Every setting, declared once: its default in the paper's setting, its help, what it may be.

Edit a default here, put it in a YAML file (`--config`), or give it as a flag; flags override the
file.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field, fields
from types import NoneType
from typing import Any, get_args, get_origin

from system.checks import (
    BETAS,
    FOLDER_NAME,
    GIVEN,
    SIDE,
    TRAJECTORY,
    Check,
    from_to,
    greater_than,
    one_of,
    word_such_as,
)
from system.paths import check_output_path
from utils import FUNCTION, TOKEN_SUFFIXES, import_function, require

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
    """Declare a field of RunConfig.

    `decides`: 'token', 'pictures', both, or nothing but speed, memory and output. `path`: whether
    it is a path, or a function of its words that tells. `topic`: the heading in --help of this
    setting and the next ones.
    """
    metadata = {
        "help": text,
        "check": check,
        "decides": decides.split(),
        "path": path,
        "topic": topic,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    """The reference setting of the paper: Stable Diffusion 1.4 on a CUDA GPU."""

    class_index: str = setting(
        "",
        "Which classes: a number counted from 1 (283), a range (1-12), a list (1,5,9), 'all', or a "
        "name ('tiger cat'). --list_classes shows them.",
        topic="What to learn",
    )
    train: bool = setting(False, "Learn a token for each class.")
    evaluate: bool = setting(
        False, "Draw pictures from the same seeds without and with the token, and judge them."
    )
    estimate: bool = setting(
        False,
        "Print what training would take (parameters, memory by batch_size, FLOPs, disk) and stop. "
        "It reads only configs, so it needs no weights, no class and no GPU.",
    )
    memory_gb: float | None = setting(
        None,
        "With estimate: the memory of a GPU in GB; names the batch_size that fits.",
        greater_than(0, 10_000),
    )
    exp_id: str = setting(
        "demo",
        "The name of the run: the last folder of every output.",
        FOLDER_NAME,
    )
    class_names: str | None = setting(
        None,
        "A YAML file {number: name} of names to use in prompts instead of the classifier's own, "
        "such as {135: crane bird}.",
        GIVEN,
        "token",
        path=True,
    )
    placeholder_token: str = setting(
        "newclas", "The token's word in prompts.", word_such_as("newclas"), "token"
    )
    initializer_token: str = setting(
        "a",
        "What the token is initialised with: a word, a phrase (one vector per token of it), or a "
        "token file to continue training from.",
        (
            lambda text: text.strip() and ("/" not in text or text.endswith(TOKEN_SUFFIXES)),
            f"a word, a phrase or a token file ({', '.join(TOKEN_SUFFIXES)})",
        ),
        "token",
        lambda text: text.endswith(TOKEN_SUFFIXES),
    )
    num_vectors: int | None = setting(
        None,
        "Number of vectors of the token; a shorter initialiser is repeated. 'none': as many as the "
        "initialiser has.",
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
        "How far to rescale guided noise towards the variance of the conditional prediction, for "
        "zero-terminal-SNR models (0.7).",
        from_to(0, 1),
        "token pictures",
    )
    mixed_precision: str = setting(
        "fp16",
        "Precision of the frozen generator: no, fp16 or bf16. The token and the classifiers are "
        "always float32.",
        one_of("no", "fp16", "bf16"),
        "token pictures",
    )
    classifier: str = setting(
        "inet",
        "The classifier that trains the token: inet, inat, cub, miniature, miniature_evaluator, a "
        "transformers image classifier (hub id or folder), timm:<name>, or zero-shot:<hub id or "
        "folder of CLIP or SigLIP>.",
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
        "The training loss: cross_entropy, norm_penalty (which also keeps the vectors' norm near "
        "the vocabulary's), or module:function, a function of images [B, 3, H, W] in [0, 1] and "
        "target classes [B] that returns losses [B].",
        (
            lambda name: re.fullmatch(rf"\w+|{FUNCTION}", name) is not None,
            "a loss's name or module:function",
        ),
        "token",
    )
    evaluator: str | None = setting(
        None,
        "A second classifier of the same classes, used only for evaluation (the same choices). "
        "'none': evaluate with the classifier that trained the token.",
        GIVEN,
        path=True,
    )
    num_train_epochs: int = setting(
        50, "Maximum number of updates.", from_to(1, 100_000), "token", topic="Training loop"
    )
    epoch_size: int = setting(5, "Images per update.", from_to(1, 10_000), "token")
    number_of_prompts: int = setting(
        3, "How many of the paper's prompt templates to use, in turn.", from_to(1, 3), "token"
    )
    lr: float = setting(
        1.25e-3, "AdamW's learning rate (0.00025 x 5 images).", greater_than(0, 1000), "token"
    )
    betas: list[float] = setting(
        [0.9, 0.999],
        "AdamW's betas.",
        BETAS,
        "token",
    )
    weight_decay: float = setting(
        1e-2, "AdamW's weight decay, of the token's vectors only.", from_to(0, 1000), "token"
    )
    eps: float = setting(1e-8, "AdamW's epsilon.", greater_than(0, 1), "token")
    max_grad_norm: float = setting(
        1.0,
        "Maximum gradient norm; larger gradients are clipped to it.",
        greater_than(0, 10**9),
        "token",
    )
    seed: int = setting(
        35,
        "Seed of the first training image; the others follow. Evaluation uses seeds 0 to test_size "
        "- 1, so this must be at least test_size.",
        from_to(0, SEEDS - 1),
        "token",
    )
    fresh_noise: bool = setting(
        False,
        "Draw new noise in every update, instead of repeating the same seeds as in the paper.",
        None,
        "token",
    )
    train_timesteps: list[int] | None = setting(
        None,
        "Timesteps of the training trajectory, such as 999 800 600; z_0 is predicted from the last "
        "one. 'none': all steps of the checkpoint's scheduler, as in the paper.",
        TRAJECTORY,
        "token",
    )
    train_guidance_scale: float | None = setting(
        None,
        "Guidance scale in training; 1 disables guidance and halves the UNet's work. 'none': the "
        "value of guidance_scale.",
        from_to(0, 100),
        "token",
    )
    target_accuracy: float = setting(
        0.7,
        "Stop when the accuracy on an update's images exceeds this; with fresh noise, on those of "
        "the last three updates.",
        from_to(0, 1),
        "token",
    )
    early_stopping: int = setting(
        15, "Stop after this many updates without a lower loss.", from_to(1, 100_000), "token"
    )
    test_size: int = setting(
        10,
        "Evaluation images per class, each without and with the token.",
        from_to(1, 100_000),
        topic="Evaluation",
    )
    token: str | None = setting(
        None,
        "Evaluate this token file, written by any tool, instead of training one; it is copied into "
        "the run.",
        GIVEN,
        path=True,
    )
    eval_prompts: list[str] = setting(
        [],
        'Additional evaluation prompts, with {} for the class, such as "A painting of {}" "A photo '
        'of a {} in the snow"; or a text file with one prompt per line.',
        path=lambda text: "{}" not in text,
    )
    context_judge: str | None = setting(
        None,
        "module:function that returns which words of a prompt a PIL image shows, or None; "
        "eval_prompts are then judged by it as well.",
        (lambda value: re.fullmatch(FUNCTION, value), "module:function"),
    )
    controls: bool = setting(
        False,
        "Also evaluate an untrained token and a random token of the same norm, to show that the "
        "gain comes from training.",
    )
    oracle_names: str | None = setting(
        None,
        "A YAML file {number: words}, such as {135: wading bird}, of better words for each class. "
        "They are evaluated without a token, as a condition of their own.",
        GIVEN,
        path=True,
    )
    attention_maps: bool = setting(
        False,
        "Show the cross-attention of the token and the class name in the first pictures, and the "
        "nearest words of the vocabulary before and after training.",
    )
    real_images: str | None = setting(
        None,
        "Real pictures to show and to compare with: a folder with one folder per class "
        "(0283_tiger_cat, 283, tiger cat or the label), or module:function, a function of a label "
        "and a random.Random that returns a picture.",
        GIVEN,
        path=True,
    )
    features: str = setting(
        "inception",
        "The features for FID, KID and coverage, where real_images are given: inception, "
        "inception:<file of weights>, or the last features of a classifier (choices as for "
        "classifier).",
        GIVEN,
        path=True,
    )
    fid_mode: str = setting(
        "clean",
        "How to resize pictures for InceptionV3: as torch-fidelity (legacy) or clean-fid (clean) "
        "does.",
        one_of("legacy", "clean"),
    )
    device: str = setting(
        "cuda",
        "The device to compute on: cuda, cuda:1, mps or cpu.",
        (lambda value: re.fullmatch(r"cuda(:\d{1,3})?|mps|cpu", value), "cuda, cuda:1, mps or cpu"),
        topic="Machine and output",
    )
    batch_size: int | None = setting(
        None,
        "Images per batch in training; affects speed and memory, not results. 'none': as many as "
        "fit into memory.",
        from_to(1, 10_000),
    )
    classes_at_once: int = setting(
        1,
        "Classes trained together in the same batches; affects speed and memory, not results.",
        from_to(1, 1000),
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the last step: slower, but takes less memory."
    )
    torch_compile: bool = setting(
        False,
        "Compile the generator's networks: takes minutes for every new batch size, then runs "
        "faster; for long sweeps.",
    )
    output_path: str = setting(
        ".", "The folder that holds pipeline_token/ and img/.", GIVEN, path=True
    )
    report_to: str | None = setting(
        None,
        "Log training curves and pictures to tensorboard (in the folder tensorboard/), wandb, "
        "trackio, or all that are installed.",
        one_of("tensorboard", "wandb", "trackio", "all"),
    )
    train_images: str = setting(
        "all",
        "Which training pictures to keep once a class is trained, 0.4 MB each at 512 x 512: all "
        "(100 MB per class for 50 updates), film (those of the at most ten updates that the report "
        "animates: 20 MB), or none.",
        one_of("all", "film", "none"),
    )
    skip_exists: bool = setting(
        True, "Skip finished classes and resume unfinished ones. False starts over."
    )

    def pick_settings(self, names: Iterable[str]) -> dict[str, Any]:
        """Return {setting: value} of some settings."""
        return {name: getattr(self, name) for name in names}

    def sampling_settings(self, training: bool = False) -> dict[str, Any]:
        """Return the fields of SamplingSettings, for training or for drawing."""
        settings = self.pick_settings(
            ("height", "width", "guidance_scale", "num_inference_steps", "guidance_rescale")
        )
        settings["timesteps"] = None
        if training and self.train_timesteps:
            settings["timesteps"] = tuple(self.train_timesteps)
        if training and self.train_guidance_scale is not None:
            settings["guidance_scale"] = self.train_guidance_scale
        return settings

    def validate_settings(self):
        """Raise UserError for the first setting that cannot work.

        The message has its name, its value and what would be right.
        """
        require(
            self.estimate or self.class_index,
            "which class? give --class_index 283, 1-12, 1,5,9, all or a name; --list_classes shows "
            "the classes of the classifier",
        )
        for entry in SETTINGS.values():
            check_value(entry, getattr(self, entry.name))
        require(
            self.estimate or self.memory_gb is None,
            f"memory_gb {self.memory_gb} is for --estimate True",
        )
        require(
            self.estimate or self.device != "cpu" or self.mixed_precision != "fp16",
            "mixed_precision fp16 is slow on device cpu: use --mixed_precision no",
        )
        if self.train:
            self.check_seeds()
        if self.token:
            self.check_token()
        self.check_labels()
        for name in ("context_judge", "loss"):
            value = getattr(self, name) or ""
            if re.fullmatch(FUNCTION, value):
                import_function(value, name)
        check_output_path(self.output_path)

    def check_seeds(self):
        """Raise UserError where training would use seeds of the evaluation."""
        require(
            self.seed >= self.test_size,
            f"seed {self.seed} would train on images that evaluation uses (seeds 0 to "
            f"{self.test_size - 1}): give --seed {self.test_size} or more, or --test_size "
            f"{self.seed} or less",
        )
        images = self.epoch_size
        if self.fresh_noise:
            images *= self.num_train_epochs
        require(
            self.seed + images <= SEEDS,
            f"seed {self.seed} is too high for {images} training images: there are {SEEDS} seeds, "
            f"after which evaluation's come back; give --seed {SEEDS - images} or less",
        )

    def check_token(self):
        """Raise UserError for settings that do not go with a token that is only evaluated."""
        require(
            not self.train,
            f"token '{self.token}' is only evaluated: leave --train True out "
            "(--initializer_token FILE continues a token)",
        )
        require(
            not self.num_vectors,
            f"num_vectors {self.num_vectors}: '{self.token}' has its own number of vectors; leave "
            "it out",
        )

    def check_labels(self):
        """Raise UserError unless `labels` is given just where zero-shot classifiers need it."""
        asking = []
        for name in ("classifier", "evaluator", "features"):
            value = getattr(self, name)
            if value and value.startswith("zero-shot:"):
                asking.append(f"{name} '{value}'")
        require(
            self.labels or not asking,
            f"{' and '.join(asking)}: give --labels names.txt, a text file with one label per line",
        )
        require(
            asking or not self.labels,
            f"labels '{self.labels}' is for zero-shot:<hub id or folder of CLIP or SigLIP>: the "
            f"classifier '{self.classifier}' has labels of its own",
        )


SETTINGS = {entry.name: entry for entry in fields(RunConfig)}


def names_deciding(what: str) -> list[str]:
    """List the settings that affect the 'token' or the 'pictures'."""
    return [name for name, entry in SETTINGS.items() if what in entry.metadata["decides"]]


def value_type(entry: Field) -> tuple[type, bool, bool]:
    """Return the type of one value, whether it is a list of them, and whether it may be None."""
    kind = entry.type
    is_optional = NoneType in get_args(kind)
    if is_optional:
        kind = get_args(kind)[0]
    if get_origin(kind) is list:
        return get_args(kind)[0], True, is_optional
    return kind, False, is_optional


def check_value(entry: Field, value):
    """Raise UserError for a value that the setting cannot have."""
    for part in value if isinstance(value, list) else [value]:
        require(
            not isinstance(part, str) or part.isprintable(),
            f"{entry.name} {part!r} has unprintable characters",
        )
    check = entry.metadata["check"]
    if check is None:
        return
    _, _, is_optional = value_type(entry)
    can_work, _ = check
    is_right = is_optional if value is None else can_work(value)
    require(is_right, f"{entry.name} must be {describe_values(entry)}, not {value!r}")


def describe_values(entry: Field) -> str:
    """Describe in words which values a setting may have."""
    kind, _, is_optional = value_type(entry)
    check = entry.metadata["check"]
    if check:
        _, words = check
    elif kind is bool:
        words = "True or False"
    else:
        words = f"of type {kind.__name__}"
    if is_optional:
        words += ", or none"
    return words
