"""DistillationHook: a classifier also learns from the logits of a teacher, for instance from its own dense form."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from prune_mm.engine.checkpoint import check_checkpoint, state_dict_of
from prune_mm.engine.compact import without_pretrained
from prune_mm.engine.prunable import unwrapped
from prune_mm.graph.trace import in_eval_mode
from prune_mm.pruners.hinge_math import distillation_loss
from prune_mm.pruners.options import check_positive
from prune_mm.registry import HOOKS

#: Sides of the images that logits are tried with.
_SIZES = (32, 64, 224)
#: Configs of this package that hold the dense model of a network as ``model``.
_HOLDERS = ("CompactModel", "PrunableModel")


@HOOKS.register_module()
class DistillationHook(Hook):
    """Adds knowledge distillation to the loss of an ``ImageClassifier``: weight * KD + (1 - weight) * its own loss.

    The model stays what it is: while it trains, the hook takes the place of its method ``loss``. The teacher is no part
    of it, so it is neither in checkpoints nor in averages nor in the optimizer. It sees the images as the model does,
    behind the model's preprocessor, in eval mode and without gradients. The log has the terms as they are summed,
    ``loss_kd`` and ``loss_ce`` (the ``loss`` of the head).

    Args:
        teacher: ``dict(checkpoint=PATH)`` for the dense network that a compact (or prunable) model was made from, or
            with ``config=PATH`` (a config file) or ``model=dict(...)`` (a model config) for another classifier of the
            same classes. In the ``finetune`` of a config, ``tools/compress.py`` knows the checkpoint:
            ``'{{pretrained}}'``.
        temperature: T, which logits are divided by; the KD term is multiplied with its square.
        weight: of the KD term, in (0, 1].

    Raises:
        ValueError: naming the argument and what would be right; before training also when model or teacher have no
            logits to compare, or the checkpoint is not one of the teacher.

    Source: Hinton et al. (2015); temperature and weight as in the fine-tuning of Hinge.
    """

    def __init__(self, teacher: dict, temperature: float = 4.0, weight: float = 0.4) -> None:
        """See the class."""
        keys = set(teacher) if isinstance(teacher, dict) else set()
        if "checkpoint" not in keys or not keys <= {"checkpoint", "config", "model"} or {"config", "model"} <= keys:
            raise ValueError(
                f"teacher={teacher!r} must be dict(checkpoint=PATH), and config=PATH or model=dict(...) unless it is "
                "the dense network of the model that trains"
            )
        check_positive("temperature", temperature)
        check_positive("weight", weight)
        if weight > 1:
            raise ValueError(f"weight={weight!r} must be a share in (0, 1]")
        self.given, self.temperature, self.weight = dict(teacher), float(temperature), float(weight)
        self.teacher: nn.Module | None = None
        self._seen: list[Tensor] = []
        self._handle: Any = None

    def before_train(self, runner: Runner) -> None:
        """Build the teacher, make sure that it and the model can be compared, and take the place of ``loss``."""
        student = unwrapped(runner.model)
        _check_classifier(student, "the model")
        with torch.random.fork_rng(devices=[]):
            teacher = self._build(runner)
        teacher.to(next(student.parameters()).device)
        sizes = {"the model": _classes(student, "the model"), "the teacher": _classes(teacher, "the teacher")}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"teacher: it tells {sizes['the teacher']} classes, the model {sizes['the model']}")
        self.teacher = teacher
        self._attach(student)
        print_log(f"distillation from '{self.given['checkpoint']}', weight {self.weight:g}", "current")

    def after_train(self, runner: Runner) -> None:
        """Give the model its own ``loss`` back."""
        if self._handle is not None:
            self._handle.remove()
            del unwrapped(runner.model).loss
        self._handle, self.teacher = None, None

    # -- the teacher ------------------------------------------------------------------------------------------

    def _build(self, runner: Runner) -> nn.Module:
        """The teacher with its weights, frozen and in eval mode."""
        teacher = MMENGINE_MODELS.build(without_pretrained(self._config(runner)))
        _check_classifier(teacher, "the teacher")
        name = str(self.given["checkpoint"])
        checkpoint = _read(name)
        check_checkpoint(teacher, checkpoint, f"teacher: '{name}'", whole=True)
        state, own = state_dict_of(checkpoint), teacher.state_dict()
        foreign = [key for key in state if key not in own]
        if foreign:
            raise ValueError(
                f"teacher: '{name}' is not a checkpoint of this {type(teacher).__name__}: it also holds "
                f"'{foreign[0]}' and {len(foreign) - 1} more tensors"
            )
        teacher.load_state_dict(state)
        return teacher.requires_grad_(False).eval()

    def _config(self, runner: Runner) -> dict:
        if "model" in self.given:
            found = copy.deepcopy(self.given["model"])
        elif "config" in self.given:
            path = str(self.given["config"])
            if not Path(path).is_file():
                raise FileNotFoundError(f"teacher: no config at '{path}'")
            found = Config.fromfile(path).model
        else:
            found = runner.cfg.get("model") or {}
            if _kind(found) not in _HOLDERS:
                raise ValueError(
                    f"teacher={self.given!r} names no network, and the model is no compact form of one; add "
                    "config=PATH or model=dict(...)"
                )
        return found["model"] if _kind(found) in _HOLDERS else found

    # -- the loss ---------------------------------------------------------------------------------------------

    def _attach(self, student: nn.Module) -> None:
        own = student.loss
        self._handle = student.head.register_forward_hook(lambda module, args, logits: self._seen.append(logits))

        def loss(inputs: Tensor, data_samples: list, **kwargs: Any) -> dict[str, Tensor]:
            self._seen.clear()
            terms = own(inputs, data_samples, **kwargs)
            logits = self._seen[-1]
            self._seen.clear()
            with torch.no_grad():
                wanted = self.teacher(inputs, mode="tensor")
            mixed = {("loss_ce" if key == "loss" else key): self._scaled(key, term) for key, term in terms.items()}
            return mixed | {
                "loss_kd": self.weight * distillation_loss(logits.float(), wanted.float(), self.temperature)
            }

        student.loss = loss

    def _scaled(self, key: str, term: Any) -> Any:
        if "loss" not in key:
            return term
        return [(1.0 - self.weight) * part for part in term] if isinstance(term, list) else (1.0 - self.weight) * term


def _kind(config: Any) -> str:
    return str(config.get("type")).rpartition(".")[2] if isinstance(config, dict) else ""


def _check_classifier(model: nn.Module, what: str) -> None:
    from mmpretrain.models import ImageClassifier

    if not isinstance(model, ImageClassifier) or not model.with_head:
        kind = f"{type(model).__name__} without a head" if isinstance(model, ImageClassifier) else type(model).__name__
        raise ValueError(f"DistillationHook compares the logits of image classifiers; {what} is a {kind}")


@torch.no_grad()
def _classes(model: nn.Module, what: str) -> int:
    """Length of the logits of one image.

    Raises:
        ValueError: when the head gives something else.
    """
    parameter, error = next(model.parameters()), None
    for side in _SIZES:
        try:
            with in_eval_mode(model):
                logits = model(torch.zeros(1, 3, side, side, device=parameter.device), mode="tensor")
        except (RuntimeError, AssertionError, IndexError) as failure:
            error = failure
            continue
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError(f"the head of {what}, a {type(model.head).__name__}, does not put out logits")
        return logits.shape[1]
    raise ValueError(f"{what} cannot be run on an image: {error}") from error


def _read(path: str) -> dict:
    if "://" in path:
        return CheckpointLoader.load_checkpoint(path, map_location="cpu")
    if not Path(path).is_file():
        raise FileNotFoundError(f"teacher: no checkpoint at '{path}'")
    try:
        # MMEngine's checkpoints hold its message hub and NumPy scalars, which weights_only refuses.
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # torch.load has no common error for damaged files
        raise ValueError(f"teacher: '{path}' is damaged or not a checkpoint: {type(error).__name__}") from error
