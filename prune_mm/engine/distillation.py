"""DistillationHook: a model also learns from a teacher, for instance from its own dense form."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor, nn

from prune_mm.engine.distillation_parts import PARTS, Part, default_part
from prune_mm.engine.distillation_teacher import TEACHER_KEYS, build_teacher, check_given
from prune_mm.engine.launch import check_checkpoint_file
from prune_mm.engine.prunable import unwrapped
from prune_mm.pruners.options import check_choice, check_positive
from prune_mm.registry import HOOKS


@HOOKS.register_module()
class DistillationHook(Hook):
    """Adds knowledge distillation to the losses of a model.

    The model stays what it is: while it trains, the hook takes the place of its method ``loss``. The teacher is no part
    of it, so it is neither in checkpoints nor in averages nor in the optimizer. It sees the images as the model does,
    behind the model's preprocessor, in eval mode and without gradients. The terms are computed in float32, and the log
    has each of them as it is summed.

    ========== ============================================ ====================================== ======
    what       compares                                     terms                                  weight
    ========== ============================================ ====================================== ======
    logits     the logits of classifiers                    ``loss_kd``                            0.4
    features   necks (of classifiers: backbones), by level  ``loss_kd_features``                   6
    head       class scores and boxes of dense heads        ``loss_kd_cls`` and ``loss_kd_bbox``   1
    ========== ============================================ ====================================== ======

    With ``logits`` the sum is weight * KD + (1 - weight) * the losses of the model; otherwise KD, with its weight, is
    added. The ``loss`` of a classifier's head is logged as ``loss_ce``.

    Args:
        teacher: ``dict(checkpoint=PATH)`` for the dense network that a compact (or prunable) model was made from, or
            with ``config=PATH`` (a config file) or ``model=dict(...)`` (a model config) for another one. In a config
            for ``tools/compress.py``, ``'{{pretrained}}'`` stands for the dense checkpoint.
        temperature: T, which logits are divided by; their term is multiplied with its square. Default: 4 for
            ``logits``, 1 for ``head``.
        weight: of the terms of distillation; see the table. For ``logits`` in (0, 1].
        what: is compared; default: ``logits`` for an ``ImageClassifier``, ``features`` for anything else.
        match: of features: ``correlation`` (default) or ``mse``; see
            :func:`~prune_mm.engine.distillation_losses.feature_loss`.

    Raises:
        ValueError: naming the argument and what would be right; before training also when model or teacher have no
            such part, the parts differ in shape, or the checkpoint is not one of the teacher.

    Source: Hinton et al. (2015); temperature and weight of logits as in the fine-tuning of Hinge.
    """

    #: Whether it was made from ``teacher=dict(...)`` at the top of a config.
    by_config = False

    def __init__(
        self,
        teacher: dict,
        temperature: float | None = None,
        weight: float | None = None,
        what: str | None = None,
        match: str | None = None,
    ) -> None:
        """See the class."""
        check_given(teacher)
        for name, value in (("temperature", temperature), ("weight", weight)):
            if value is not None:
                check_positive(name, value)
        if what is not None:
            check_choice("what", what, PARTS)
        self.given, self.what, self.weight = dict(teacher), what, weight
        self._options = {"temperature": temperature, "match": match}
        self.teacher: nn.Module | None = None
        self._seen: list[Any] = []
        self._handle: Any = None
        if what is not None:
            self._part(what)

    def before_train(self, runner: Runner) -> None:
        """Build the teacher, make sure that it and the model can be compared, and take the place of ``loss``."""
        student = unwrapped(runner.model)
        if "loss" in vars(student):
            raise ValueError("the model has a teacher already; leave one of the two out")
        what = self.what or default_part(student)
        part = self._part(what)
        part.module(student, "the model")
        teacher = build_teacher(self.given, runner.cfg.get("model"), part.module)
        teacher.to(next(student.parameters()).device)
        part.check_alike(student, teacher)
        self.attach(student, teacher, part)
        print_log(f"distillation of {what} from '{self.given['checkpoint']}'", "current")

    def after_train(self, runner: Runner) -> None:
        """Give the model its own ``loss`` back."""
        if self._handle is not None:
            self._handle.remove()
            del unwrapped(runner.model).loss
        self._handle, self.teacher = None, None

    def attach(self, student: nn.Module, teacher: nn.Module, part: Part | None = None) -> None:
        """Let ``student.loss`` also hold what the teacher says.

        Args:
            student: the model that trains.
            teacher: in eval mode, on the same device.
            part: what is compared, and already checked to be alike; None: check it.
        """
        if part is None:
            part = self._part(self.what or default_part(student))
            part.check_alike(student, teacher)
        own, weight = student.loss, part.weight if self.weight is None else self.weight
        share = 1.0 - weight if part.replaces else 1.0
        self.teacher = teacher
        module = part.module(student, "the model")
        self._handle = module.register_forward_hook(lambda module, args, output: self._seen.append(output))

        def loss(inputs: Tensor, data_samples: list, **kwargs: Any) -> dict[str, Tensor]:
            self._seen.clear()
            terms = own(inputs, data_samples, **kwargs)
            given = self._seen[-1]
            self._seen.clear()
            wanted = part.output(teacher, inputs, "the teacher")
            with torch.autocast(next(student.parameters()).device.type, enabled=False):
                found = {name: weight * term for name, term in part.losses(given, wanted).items()}
            return {_renamed(name): _scaled(name, term, share) for name, term in terms.items()} | found

        student.loss = loss

    def _part(self, what: str) -> Part:
        """The part with its options.

        Raises:
            ValueError: for an option that does not fit it.
        """
        part = PARTS[what](**self._options)
        if part.replaces and self.weight is not None and self.weight > 1:
            raise ValueError(f"weight={self.weight!r} must be a share in (0, 1]")
        return part


def _renamed(name: str) -> str:
    """A term called ``loss`` would hide the sum, which MMEngine logs under that name."""
    return "loss_ce" if name == "loss" else name


def _scaled(name: str, term: Any, share: float) -> Any:
    if "loss" not in name or share == 1.0:
        return term
    return [share * part for part in term] if isinstance(term, list) else share * term


# -- teacher=dict(...) at the top of a config -------------------------------------------------------------------------


def hook_of(settings: Any) -> DistillationHook:
    """The hook that ``teacher=dict(checkpoint=..., ...)`` at the top of a config stands for.

    Args:
        settings: where the teacher is (``checkpoint``, ``config`` or ``model``), and options of the hook.

    Raises:
        ValueError: naming the option and what would be right.
    """
    if not isinstance(settings, dict):
        check_given(settings)
    settings = dict(settings)
    options = {key: settings.pop(key) for key in ("temperature", "weight", "what", "match") if key in settings}
    unknown = [key for key in settings if key not in TEACHER_KEYS]
    if unknown:
        known = (*TEACHER_KEYS, "what", "weight", "temperature", "match")
        raise ValueError(f"teacher has no option {unknown[0]!r}; there are: {', '.join(known)}")
    hook = DistillationHook(settings, **options)
    hook.by_config = True
    return hook


def check_teacher(config: Config) -> None:
    """Look at the ``teacher`` of a config before anything is built.

    Raises:
        FileNotFoundError: when there is no such checkpoint.
        ValueError: when an option is wrong, the checkpoint is damaged, or there is a hook, too.
    """
    if not config.get("teacher"):
        return
    hook = hook_of(config.teacher)
    _check_single(str(item.get("type")).rpartition(".")[2] for item in config.get("custom_hooks") or [])
    try:
        check_checkpoint_file(str(hook.given["checkpoint"]))
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"teacher: {error}") from error


def add_teacher(runner: Runner, priority: str = "NORMAL") -> None:
    """Register the hook that ``teacher`` in the runner's config stands for, if it has one; once.

    Raises:
        ValueError: when its settings are wrong, or there is such a hook already.
    """
    if not runner.cfg.get("teacher"):
        return
    there = [hook for hook in runner.hooks if isinstance(hook, DistillationHook)]
    if any(hook.by_config for hook in there):
        return
    _check_single(type(hook).__name__ for hook in there)
    runner.register_hook(hook_of(runner.cfg.teacher), priority=priority)


def _check_single(kinds: Any) -> None:
    if "DistillationHook" in kinds:
        raise ValueError("the config has both teacher=dict(...) and a DistillationHook; leave one of them out")
