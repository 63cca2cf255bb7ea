"""Which OpenMMLab packages are installed: the original ones, or the maintained ``onedl`` forks.

Both families install the same import folders. Whoever installs both gets the files of one over those of the other;
pip does not notice.
"""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

#: Import folder, and the distributions that write it.
DISTRIBUTIONS = {
    "mmengine": ("mmengine", "mmengine-lite", "onedl-mmengine"),
    "mmcv": ("mmcv", "mmcv-lite", "mmcv-full", "onedl-mmcv"),
    "mmdet": ("mmdet", "onedl-mmdetection"),
    "mmpretrain": ("mmpretrain", "onedl-mmpretrain"),
}


def installed_distributions(folder: str) -> dict[str, str]:
    """The installed distributions that write an import folder of OpenMMLab, with their versions."""
    found = {}
    for name in DISTRIBUTIONS[folder]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_openmmlab_packages() -> None:
    """Warn, once and before anything is built, of an environment in which OpenMMLab packages are broken.

    A warning and not an error: the package that was installed last may be whole, and only the user knows.
    """
    for folder in DISTRIBUTIONS:
        found = installed_distributions(folder)
        if len(found) > 1:
            both = " and ".join(f"{name} {number}" for name, number in found.items())
            warnings.warn(
                f"{both} are both installed and write the same folder '{folder}', so its files may be a mixture; "
                f"keep one: `pip uninstall -y {' '.join(found)}`, then install that one again",
                stacklevel=2,
            )
    _check_pkg_resources()


def _check_pkg_resources() -> None:
    """MMEngine 0.10.7 finds the configs of the zoo by ``pkg_resources``, which setuptools 82 dropped."""
    engine = find_spec("mmengine")
    if engine is None or engine.origin is None or find_spec("pkg_resources") is not None:
        return
    source = Path(engine.origin).parent / "utils" / "package_utils.py"
    if source.is_file() and "import pkg_resources" in source.read_text(encoding="utf-8"):
        warnings.warn(
            "this mmengine finds configs like 'mmdet::...' by the module pkg_resources, which is not installed: "
            "`pip install 'setuptools<82'`",
            stacklevel=3,
        )
