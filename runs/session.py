"""A configuration at work: its classes, folders and models."""

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch

from config import RunConfig, names_deciding
from evaluation.drawing import Drawer
from method.class_training import ClassTraining, TrainingSettings
from method.losses import Loss, build_loss
from method.update import fit_token_gradient
from models.classifiers import Classifier, load_classifier, load_evaluator, load_labels
from models.generator import PRECISIONS, Generator, load_generator
from models.sampling import SamplingSettings
from prompt_datasets import TEMPLATES, TargetClass, class_names, oracle_words, select_classes
from runs.device import choose_device
from runs.estimate import EstimateSettings, estimate_run
from runs.folders import RunFolder
from runs.start import pin_checkpoints
from runs.tracking import RunTrackers
from system.paths import list_checkpoint_files
from system.terminal import print_warning
from tokens.class_token import check_widths, load_token, start_vectors


class Session:
    """The classes, folders and models of a configuration; models are loaded when first used.

    The one place where a configuration becomes models: command, page and experiments all open one.
    """

    def __init__(self, config: RunConfig, shared: dict | None = None):
        """Open a session; models that `shared`, another session, also uses are loaded once.

        Raises:
            UserError: a device, a classifier or a class that is not there.
        """
        config = pin_checkpoints(config)
        self.config = config
        self.shared: dict[tuple, Any] = {} if shared is None else shared
        local_rank = int(os.environ.get("LOCAL_RANK", "-1"))
        self.device = choose_device(config.device, local_rank)
        self.labels: list[str] = self.call_once(load_labels, config.classifier, config.labels)
        self.names = class_names(self.labels, config.class_names)
        self.targets = select_classes(config.class_index, self.labels, self.names)
        self.better_words = oracle_words(config.oracle_names, self.labels, self.targets)
        self.folders = {target: self.open_folder(target) for target in self.targets}
        self.sampling = SamplingSettings(**config.sampling_settings())
        self.training_sampling = find_training_sampling(config)
        self.training_settings = find_training_settings(config)
        self.trackers = None
        if config.report_to:
            self.trackers = RunTrackers(config.report_to, config.output_path, asdict(config))

    def call_once(self, function: Callable, *arguments):
        """Return what `function` returned at its first such call by a session of these models."""
        key = (function, *arguments)
        if key not in self.shared:
            self.shared[key] = function(*arguments)
        return self.shared[key]

    def with_settings(self, **changes) -> "Session":
        """Open a session with other settings, which shares the models that these do not change."""
        return Session(replace(self.config, **changes), self.shared)

    def every_class(self) -> list[TargetClass]:
        """Return all classes of the classifier, whichever this session is about."""
        return select_classes("all", self.labels, self.names)

    def open_folder(self, target: TargetClass) -> RunFolder:
        """Open the class's files under this configuration's exp_id."""
        config = self.config
        defaults = asdict(RunConfig())
        return RunFolder(config.output_path, config.classifier, target, config.exp_id, defaults)

    @cached_property
    def generator(self) -> Generator:
        """The frozen generator, checked to take every prompt of these classes."""
        config = self.config
        generator = self.call_once(
            open_generator,
            config.model,
            self.device,
            PRECISIONS[config.mixed_precision],
            config.gradient_checkpointing,
            config.torch_compile,
            config.placeholder_token,
        )
        self.check_generator(generator)
        return generator

    def check_generator(self, generator: Generator):
        """Warn of a use that the checkpoint was not made for.

        Raises:
            UserError: a trajectory, a token or a prompt that the generator cannot take.
        """
        config = self.config
        generator.check_sampling(self.sampling)
        if config.train:
            generator.check_sampling(self.training_sampling, is_training=True)
        for mismatch in generator.describe_mismatches(self.sampling):
            self.call_once(print_warning, f"'{config.model}': {mismatch}")
        if config.train or config.evaluate:
            self.check_prompts(generator)

    def check_prompts(self, generator: Generator):
        """Raise UserError for a token of another model, or a prompt that is too long with it."""
        config = self.config
        num_vectors = self.count_vectors(generator)
        templates = list(TEMPLATES[: config.number_of_prompts])
        if config.evaluate:
            templates += config.eval_prompts
        for target in self.targets:
            phrase = f"{config.placeholder_token} {target.name}"
            prompts = [template.format(phrase) for template in templates]
            prompts.append(TEMPLATES[0].format(self.better_words.get(target, "")))
            generator.check_prompts(prompts, num_vectors)

    def count_vectors(self, generator: Generator) -> int:
        """Return the number of the token's vectors, given or to be trained; print it if several."""
        config = self.config
        if config.token:
            token = load_token(config.token)
            check_widths(token, generator, config.token)
            return len(token.vectors)
        count = len(self.start_vectors(generator))
        if count > 1:
            start = config.initializer_token
            self.call_once(print, f"the token has {count} vectors, started from '{start}'")
        return count

    def start_vectors(self, generator: Generator) -> torch.Tensor:
        """Return the vectors [K, D] that training starts from."""
        return start_vectors(generator, self.config.initializer_token, self.config.num_vectors)

    @cached_property
    def classifier(self) -> Classifier:
        """The classifier that trains the token."""
        config = self.config
        size = config.height, config.width
        return self.call_once(load_classifier, config.classifier, self.device, *size, config.labels)

    @cached_property
    def evaluator(self) -> Classifier | None:
        """The classifier of the same classes that only judges; None without one."""
        config = self.config
        if not config.evaluator:
            return None
        return self.call_once(
            load_same_classes,
            config.evaluator,
            tuple(self.labels),
            self.device,
            config.height,
            config.width,
            config.labels,
        )

    @property
    def judge(self) -> Classifier:
        """The evaluator, or the classifier where there is none."""
        return self.evaluator or self.classifier

    @property
    def judges(self) -> dict[str, Classifier]:
        """By role: the classifier, and the evaluator where there is one."""
        judges = {"classifier": self.classifier}
        if self.evaluator:
            judges["evaluator"] = self.evaluator
        return judges

    @cached_property
    def loss(self) -> Loss:
        """The training loss."""
        return build_loss(self.config.loss, self.classifier, self.generator)

    @cached_property
    def fitted_gradient(self) -> Callable:
        """`token_gradient` with as many images at once as fit into memory."""
        config = self.config
        classes = min(config.classes_at_once, len(self.targets))
        images = classes * config.epoch_size
        return fit_token_gradient(images, config.batch_size, self.training_sampling, self.device)

    @cached_property
    def drawer(self) -> Drawer:
        """Draws pictures, and loads the generator if one is missing."""
        config = self.config
        drawn_by = {
            "weights": list_checkpoint_files(config.model),
            **config.pick_settings(names_deciding("pictures")),
        }
        return Drawer(
            lambda: self.generator, self.sampling, drawn_by, self.device, config.batch_size
        )

    def load_now(self, *names: str):
        """Load models by the names of their properties, which would otherwise load at first use."""
        for name in names:
            getattr(self, name)

    @cached_property
    def evaluation(self):
        """The evaluation of these classes (runs.evaluation.Evaluation)."""
        from runs.evaluation import Evaluation  # plots and distances take seconds to import

        return Evaluation(self)

    def start_training(self, folder: RunFolder) -> ClassTraining:
        """Begin the training of a class in its folder, or resume it."""
        return ClassTraining(
            folder.target,
            self.start_vectors(self.generator),
            self.training_settings,
            self.generator.dtype,
            folder.history_file,
            folder.state_file,
            folder.train_images,
        )


def find_training_settings(config: RunConfig) -> TrainingSettings:
    """Return what affects a token besides generator, sampling and classifier."""
    return TrainingSettings(**config.pick_settings(TrainingSettings._fields))


def find_training_sampling(config: RunConfig) -> SamplingSettings:
    """Return how training draws its images."""
    return SamplingSettings(**config.sampling_settings(training=True))


def open_generator(
    model: str,
    device: str,
    dtype: torch.dtype,
    gradient_checkpointing: bool,
    compile_networks: bool,
    placeholder: str,
) -> Generator:
    """Load the generator and teach its tokenizers the placeholder; see `load_generator`."""
    generator = load_generator(model, device, dtype, gradient_checkpointing, compile_networks)
    generator.set_placeholder(placeholder)
    return generator


def load_same_classes(
    name: str,
    labels: tuple[str, ...],
    device: str,
    height: int,
    width: int,
    labels_file: str | None,
) -> Classifier:
    """Load the evaluator `name`, which must know the classes `labels`; see `load_evaluator`."""
    return load_evaluator(name, list(labels), device, height, width, labels_file)


def estimate_training(config: RunConfig) -> str:
    """Return what training by `config` would take, as text, from configs alone.

    Raises:
        UserError: what a run would refuse.
    """
    settings = EstimateSettings(**config.pick_settings(EstimateSettings._fields))
    return estimate_run(settings, find_training_sampling(config))
