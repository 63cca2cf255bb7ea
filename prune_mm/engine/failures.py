"""What goes wrong in the middle of a training, said in one line: full disks, dead workers, unreadable samples, NaN."""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from mmengine.runner import Runner
from torch import Tensor

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Losses in a row that may overflow in half precision: the gradient scaler skips those steps.
OVERFLOWS = 10
_RESUME = "what was saved before is whole; a training goes on from it with --resume"


class BrokenTraining(ValueError):
    """A loss or a weight is NaN or infinite."""


class UnreadableSample(ValueError):
    """A sample of a dataset cannot be read or augmented."""


def explain(error: BaseException) -> str | None:
    """One line for what is no defect of the program; None when it may be one."""
    for cause in _causes(error):
        text = str(cause)
        if isinstance(cause, BrokenTraining):
            return text
        if isinstance(cause, UnreadableSample):
            # A worker process sends its traceback along.
            return text.strip().splitlines()[-1].rpartition(f"{UnreadableSample.__name__}: ")[2]
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            return f"no room to write '{cause.filename}' ({cause.strerror}): make room; {_RESUME}"
        if re.search(rf"(os error |code: )({'|'.join(map(str, NO_ROOM))})\b", text):
            return f"no room left on the disk ({text.splitlines()[0][:100]}): make room; {_RESUME}"
        if isinstance(cause, RuntimeError) and re.search(
            r"DataLoader worker .*(killed by signal|exited unexpect)", text
        ):
            return (
                f"a data worker died ({text.splitlines()[0][:120]}): often memory or /dev/shm is full; use fewer "
                f"workers (train_dataloader.num_workers); {_RESUME}"
            )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


class NamedSamples:
    """A dataset's pipeline whose failures name the sample.

    Args:
        pipeline: callable that takes the sample's dict.
    """

    def __init__(self, pipeline: Any) -> None:
        """See the class."""
        self.pipeline = pipeline

    def __call__(self, results: dict) -> dict | None:
        """Run the pipeline.

        Raises:
            UnreadableSample: naming the image, when a transform fails.
        """
        name = results.get("img_path") or f"number {results.get('sample_idx')}"
        try:
            return self.pipeline(results)
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "")[:150] or type(error).__name__
            raise UnreadableSample(
                f"sample '{name}' cannot be read ({type(error).__name__}: {reason}); repair it or take it out of the "
                f"list; {_RESUME}"
            ) from error

    def __getattr__(self, name: str) -> Any:
        """Everything else is the pipeline's."""
        if name == "pipeline":
            raise AttributeError(name)
        return getattr(self.pipeline, name)


def name_samples(dataset: Any) -> None:
    """Let the datasets inside ``dataset`` name what they cannot read; safe to call twice."""
    if dataset is None:
        return
    pipeline = getattr(dataset, "pipeline", None)
    if callable(pipeline) and not isinstance(pipeline, NamedSamples):
        dataset.pipeline = NamedSamples(pipeline)
    name_samples(getattr(dataset, "dataset", None))
    for inner in getattr(dataset, "datasets", None) or ():
        name_samples(inner)


class LossWatch:
    """Stops a training whose loss is NaN or infinite, before anything is saved or decided with such weights."""

    def __init__(self) -> None:
        """None was seen yet."""
        self.overflows = 0

    def check(self, runner: Runner, outputs: Mapping[str, Any] | None) -> None:
        """Look at the losses of an iteration, as MMEngine has logged them.

        Raises:
            BrokenTraining: naming the losses, and what helps.
        """
        scalars = runner.message_hub.log_scalars
        values = {name: scalars[f"train/{name}"].current() for name in outputs or () if f"train/{name}" in scalars}
        broken = [name for name, value in values.items() if "loss" in name and not math.isfinite(value)]
        self.overflows = self.overflows + 1 if broken else 0
        scaled = hasattr(runner.optim_wrapper, "loss_scaler")
        if broken and not (scaled and self.overflows <= OVERFLOWS):
            found = ", ".join(f"{name}={values[name]}" for name in broken)
            rates = runner.optim_wrapper.get_lr()
            rate = max(rates.get("lr") or [0.0])
            raise BrokenTraining(
                f"the training broke down in iteration {runner.iter + 1}: {found}. A smaller learning rate (it is "
                f"{rate:g}) or optim_wrapper.clip_grad=dict(max_norm=10) may help; {_RESUME}"
            )


def check_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Make sure that weights are numbers.

    Args:
        tensors: names and values; other types than floating point ones are passed over.
        what: would be done with them.

    Raises:
        BrokenTraining: naming the first that is not finite.
    """
    known = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    if not known:
        return
    whole = torch.stack([tensor.detach().isfinite().all() for _, tensor in known])
    if not bool(whole.all()):
        name = known[int((~whole).nonzero()[0])][0]
        raise BrokenTraining(f"'{name}' holds NaN or infinity, so {what} is refused; {_RESUME}")
