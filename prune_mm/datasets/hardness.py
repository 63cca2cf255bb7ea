"""How hard the objects in the generated pictures are to find."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from prune_mm.datasets.drawing import OBJECTS

COCO_CLASSES = ("circle", "square", "triangle")
MIN_RADIUS = 6.5
MIN_VISIBLE_AREA = 40


@dataclass(frozen=True)
class Difficulty:
    """How hard the objects are to find.

    Attributes:
        classes: names of the outlines that are objects, in the order of their category ids.
        clutter: most marks that are no objects behind those of an image.
        occluders: most strokes across them.
        occlusion: largest share of an object that may be hidden, in [0, 0.9].
        min_radius: of the smallest objects in pixels, at least 3.
    """

    classes: tuple[str, ...] = COCO_CLASSES
    clutter: int = 0
    occluders: int = 0
    occlusion: float = 0.4
    min_radius: float = MIN_RADIUS

    def check(self) -> None:
        """Raise ValueError, naming what is out of range and what would be right."""
        odd = [name for name in self.classes if name not in OBJECTS]
        if odd or not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes={self.classes} must be different names out of {', '.join(OBJECTS)}")
        for name in ("clutter", "occluders"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.occlusion <= 0.9:
            raise ValueError(f"occlusion must be a share from 0 to 0.9, got {self.occlusion}")
        if self.min_radius < 3:
            raise ValueError(f"min_radius must be at least 3 pixels, got {self.min_radius}")

    @property
    def min_share(self) -> float:
        """Share of an object that is always seen."""
        return 1.0 - self.occlusion

    @property
    def min_area(self) -> float:
        """Pixels of an object that are always seen; the smallest outlines fill about the square of their radius."""
        return MIN_VISIBLE_AREA if self.min_radius >= MIN_RADIUS else 0.5 * self.min_radius**2


DEMO = Difficulty()


def difficulty_of(options: dict[str, Any]) -> Difficulty:
    """A checked difficulty; what is not given is as in the demo.

    Raises:
        ValueError: there is no such option, or its value is out of range.
    """
    unknown = sorted(set(options) - set(asdict(DEMO)))
    if unknown:
        raise ValueError(f"there is no option '{unknown[0]}'; there are {', '.join(asdict(DEMO))}")
    if "classes" in options:
        options = {**options, "classes": tuple(options["classes"])}
    difficulty = Difficulty(**options)
    difficulty.check()
    return difficulty
