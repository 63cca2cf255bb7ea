"""Which part of a model is compared with that of its teacher: logits, features, or what a dense head puts out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prune_mm.engine.distillation_losses import MATCHES, feature_loss, head_losses
from prune_mm.graph.tensors import tensors_in
from prune_mm.graph.trace import in_eval_mode
from prune_mm.pruners.hinge_math import distillation_loss
from prune_mm.pruners.options import check_choice

#: Sides of the images that models are tried with.
_SIZES = (32, 64, 128, 224, 320, 512)


class Part(ABC):
    """A part of a model, and how it is compared.

    Attributes:
        weight: of the losses, when nothing else is said.
        replaces: whether the losses take their share from the losses of the model, instead of being added to them.
    """

    weight = 1.0
    replaces = False

    @abstractmethod
    def module(self, model: nn.Module, what: str) -> nn.Module:
        """The module whose output is compared.

        Args:
            model: student or teacher.
            what: which of them, for messages.

        Raises:
            ValueError: when there is none.
        """

    @abstractmethod
    def run(self, model: nn.Module, images: Tensor) -> Any:
        """Run the model as far as that module."""

    @abstractmethod
    def losses(self, given: Any, wanted: Any) -> dict[str, Tensor]:
        """Losses by name, without weights, from the output of student and teacher, in float32."""

    @torch.no_grad()
    def output(self, model: nn.Module, images: Tensor, what: str) -> Any:
        """What the module puts out for images ``(N, C, H, W)``.

        Raises:
            ValueError: when it is not run.
        """
        seen: list[Any] = []
        handle = self.module(model, what).register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            self.run(model, images)
        finally:
            handle.remove()
        if not seen:
            raise ValueError(f"teacher: the part of {what} that is compared is not run on its images")
        return seen[-1]

    def check_alike(self, student: nn.Module, teacher: nn.Module) -> None:
        """Make sure that what student and teacher put out can be compared.

        Raises:
            ValueError: naming the shapes of both.
        """
        given, images = _tried(lambda images: self.output(student, images, "the model"), student)
        with in_eval_mode(teacher):
            wanted = self.output(teacher, images, "the teacher")
        shapes = [[tuple(tensor.shape[1:]) for tensor in tensors_in(output)] for output in (given, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"teacher: for an image of {images.shape[-1]} pixels it puts out {_listed(shapes[1])}, the model "
                f"{_listed(shapes[0])}; they must be the same to be compared"
            )


class Logits(Part):
    """The logits of a classifier, by the divergence of their softmax."""

    weight, replaces = 0.4, True

    def __init__(self, temperature: float | None = None, match: str | None = None) -> None:
        """Options of the loss; None: the default."""
        _check_superfluous("logits", match=match)
        self.temperature = 4.0 if temperature is None else float(temperature)

    def module(self, model: nn.Module, what: str) -> nn.Module:
        """The head."""
        if not _is_classifier(model) or getattr(model, "head", None) is None:
            kind = type(model).__name__ + (" without a head" if _is_classifier(model) else ": use what='features'")
            raise ValueError(f"what='logits' compares the logits of image classifiers; {what} is a {kind}")
        return model.head

    def run(self, model: nn.Module, images: Tensor) -> Any:
        """All of it."""
        return model(images, mode="tensor")

    def check_alike(self, student: nn.Module, teacher: nn.Module) -> None:
        """The same number of classes, and one logit for each."""
        counts = []
        for model, what in ((student, "the model"), (teacher, "the teacher")):
            logits, _ = _tried(lambda images, model=model, what=what: self.output(model, images, what), model)
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                raise ValueError(f"the head of {what}, a {type(model.head).__name__}, does not put out logits")
            counts.append(logits.shape[1])
        if counts[0] != counts[1]:
            raise ValueError(f"teacher: it tells {counts[1]} classes, the model {counts[0]}")

    def losses(self, given: Any, wanted: Any) -> dict[str, Tensor]:
        """One."""
        return {"loss_kd": distillation_loss(given.float(), wanted.float(), self.temperature)}


class Features(Part):
    """What the neck puts out (of a classifier, or without a neck: the backbone), level by level."""

    weight = 6.0

    def __init__(self, temperature: float | None = None, match: str | None = None) -> None:
        """Options of the loss; None: the default."""
        _check_superfluous("features", temperature=temperature)
        self.match = MATCHES[0] if match is None else match
        check_choice("match", self.match, MATCHES)

    def module(self, model: nn.Module, what: str) -> nn.Module:
        """Neck or backbone."""
        neck = None if _is_classifier(model) else getattr(model, "neck", None)
        found = getattr(model, "backbone", None) if neck is None else neck
        if not isinstance(found, nn.Module) or not hasattr(model, "extract_feat"):
            raise ValueError(f"what='features' compares what necks or backbones put out; {what} is a "
                             f"{type(model).__name__}, which has neither")  # fmt: skip
        return found

    def run(self, model: nn.Module, images: Tensor) -> Any:
        """Backbone and neck."""
        return model.extract_feat(images)

    def losses(self, given: Any, wanted: Any) -> dict[str, Tensor]:
        """One."""
        levels = [[tensor.float() for tensor in tensors_in(output)] for output in (given, wanted)]
        return {"loss_kd_features": feature_loss(*levels, match=self.match)}


class Head(Part):
    """Class scores and boxes of a dense head (SSD, RetinaNet, ...), prior by prior."""

    def __init__(self, temperature: float | None = None, match: str | None = None) -> None:
        """Options of the loss; None: the default."""
        _check_superfluous("head", match=match)
        self.temperature = 1.0 if temperature is None else float(temperature)
        self.classes, self.sigmoid = 0, False

    def module(self, model: nn.Module, what: str) -> nn.Module:
        """The ``bbox_head``."""
        head = getattr(model, "bbox_head", None)
        if not isinstance(head, nn.Module) or not all(
            hasattr(head, k) for k in ("cls_out_channels", "use_sigmoid_cls")
        ):
            raise ValueError(
                "what='head' compares class scores and boxes of a dense bbox_head, as of an SSD; "
                f"{what} is a {type(model).__name__}: use what='features'"
            )
        return head

    def run(self, model: nn.Module, images: Tensor) -> Any:
        """All but the choice of boxes."""
        return model.bbox_head(model.extract_feat(images))

    def check_alike(self, student: nn.Module, teacher: nn.Module) -> None:
        """Scores and boxes, and nothing else, of the same priors and classes."""
        kinds = []
        for model, what in ((student, "the model"), (teacher, "the teacher")):
            head = self.module(model, what)
            output, _ = _tried(lambda images, model=model, what=what: self.output(model, images, what), model)
            if not isinstance(output, tuple) or len(output) != 2 or not all(isinstance(part, list) for part in output):
                raise ValueError(
                    f"what='head' compares class scores and boxes; the {type(head).__name__} of {what} puts out other "
                    "things: use what='features'"
                )
            kinds.append((int(head.cls_out_channels), bool(head.use_sigmoid_cls)))
        if kinds[0] != kinds[1]:
            found = [f"{count} scores a box by {'sigmoid' if sigmoid else 'softmax'}" for count, sigmoid in kinds]
            raise ValueError(f"teacher: it gives {found[1]}, the model {found[0]}")
        super().check_alike(student, teacher)
        self.classes, self.sigmoid = kinds[0]

    def losses(self, given: Any, wanted: Any) -> dict[str, Tensor]:
        """One of classes, one of boxes."""
        outputs = [tuple([level.float() for level in part] for part in output) for output in (given, wanted)]
        found = head_losses(outputs[0], outputs[1], self.classes, self.sigmoid, self.temperature)
        return {f"loss_kd_{name}": value for name, value in found.items()}


PARTS: dict[str, type[Part]] = {"logits": Logits, "features": Features, "head": Head}


def default_part(model: nn.Module) -> str:
    """What is compared when nothing is said: the logits of a classifier, the features of anything else."""
    return "logits" if _is_classifier(model) else "features"


def _is_classifier(model: nn.Module) -> bool:
    # By name, so that training a detector does not import MMPretrain.
    return any(kind.__name__ == "ImageClassifier" for kind in type(model).__mro__)


def _check_superfluous(what: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} means nothing for what={what!r}; leave it out")


def _tried(run: Callable[[Tensor], Any], model: nn.Module) -> tuple[Any, Tensor]:
    """What a model does with the smallest image it can be run on, and that image.

    Raises:
        ValueError: when there is none, with the last error.
    """
    parameter, error = next(model.parameters()), None
    channels = getattr(getattr(model, "backbone", None), "in_channels", 3)
    channels = channels if isinstance(channels, int) and channels in (1, 3, 4) else 3
    for side in _SIZES:
        images = torch.zeros(1, channels, side, side, device=parameter.device)
        try:
            with in_eval_mode(model), torch.no_grad():
                return run(images), images
        except (RuntimeError, AssertionError, IndexError) as failure:
            error = failure
    raise ValueError(f"teacher: no image was found that a {type(model).__name__} can be run on: {error}") from error


def _listed(shapes: list[tuple[int, ...]]) -> str:
    """Shapes for a message, the first four."""
    shown = ", ".join("x".join(map(str, shape)) for shape in shapes[:4])
    return f"{len(shapes)} tensors ({shown}{', ...' if len(shapes) > 4 else ''})"
