"""A stand-in for ``mmcv._ext``, the compiled module that a pure-Python mmcv install lacks.

Nothing here imports torch, torchvision or mmcv: the operators of :mod:`prune_mm.compat.mmcv_ops` are loaded
when mmcv first asks for one, so installing the stand-in costs next to nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

EXT_NAME = "mmcv._ext"


def install_mmcv_ops() -> bool:
    """Make ``import mmcv.ops`` work when mmcv has no compiled operators.

    Puts a :class:`TorchvisionExt` into ``sys.modules`` as ``mmcv._ext``, unless a compiled one exists on disk
    or any module of that name is already loaded. Cheap and idempotent; call it before ``mmcv.ops`` is
    imported. Never raises.

    Returns:
        True if the torchvision-backed module is the one in force, False if mmcv is absent or has its own.
    """
    if EXT_NAME in sys.modules:
        return isinstance(sys.modules[EXT_NAME], TorchvisionExt)
    parent = _spec_of_mmcv()
    if parent is None or PathFinder.find_spec(EXT_NAME, parent.submodule_search_locations) is not None:
        return False
    ext = TorchvisionExt()
    sys.modules[EXT_NAME] = ext
    ext._bind_to_parent()
    return True


def _spec_of_mmcv() -> ModuleSpec | None:
    """Where mmcv is, without importing it; None when there is no such package."""
    try:
        spec = find_spec("mmcv")
    except (ImportError, ValueError):  # ValueError: a module with no __spec__ sits in sys.modules
        return None
    return spec if spec is not None and spec.submodule_search_locations is not None else None


class _NothingToLoad(Loader):
    """The loader named by the stand-in's spec: mmcv's ``check_ops_exist`` looks for one."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the stand-in that is in force, or a new one."""
        loaded = sys.modules.get(spec.name)
        return loaded if isinstance(loaded, TorchvisionExt) else TorchvisionExt()

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: operators are looked up on first use."""


class TorchvisionExt(ModuleType):
    """The module object named ``mmcv._ext``.

    Public attributes are operators. Those of :data:`prune_mm.compat.mmcv_ops.OPERATORS` work; any other name
    gives a function that raises ``NotImplementedError`` when *called*, because ``mmcv.ops`` asserts at import
    time that every operator exists. Names that start with an underscore follow the ordinary rules of modules.
    """

    def __init__(self) -> None:
        super().__init__(EXT_NAME, "mmcv operators on top of torchvision (prune_mm.compat)")
        self.__spec__ = ModuleSpec(EXT_NAME, _NothingToLoad(), origin="prune_mm.compat")
        self.__loader__ = self.__spec__.loader
        self.__package__ = "mmcv"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Look an operator up on first access.

        Raises:
            AttributeError: for private and dunder names, so that inspect, pickle and copy see a plain module.
        """
        if name.startswith("_"):
            raise AttributeError(f"module {EXT_NAME!r} has no attribute {name!r}")
        self._bind_to_parent()
        from .mmcv_ops import OPERATORS  # here, because it imports torchvision

        operator = OPERATORS.get(name) or _missing_operator(name)
        setattr(self, name, operator)
        return operator

    def __dir__(self) -> list[str]:
        """List the operators that work, beside the module's own attributes."""
        from .mmcv_ops import OPERATORS

        return sorted({*super().__dir__(), *OPERATORS})

    def _bind_to_parent(self) -> None:
        # The import system sets a submodule on its package only when it loads it, which never happens here.
        parent = sys.modules.get("mmcv")
        if parent is not None and "_ext" not in vars(parent):
            parent._ext = self  # type: ignore[attr-defined]


def _missing_operator(name: str) -> Callable[..., NoReturn]:
    """Return a function that says that operator ``name`` is missing, and what to do about it."""

    def missing(*args: object, **kwargs: object) -> NoReturn:
        from .packages import installed_distributions

        here = " ".join(installed_distributions("mmcv")) or "mmcv"
        package = "onedl-mmcv" if here.startswith("onedl") else "mmcv"
        version = "" if here.startswith("onedl") else "==2.1.0"
        raise NotImplementedError(
            f"mmcv operator '{name}' is not available: this mmcv has no compiled operators, and prune_mm's "
            "torchvision-backed replacement does not cover it. To get it, build mmcv with its operators "
            "in an environment that has torch, a C++ compiler and, for the GPU, the CUDA toolkit: "
            f"`pip uninstall -y {here} && MMCV_WITH_OPS=1 pip install --no-deps --no-build-isolation "
            f"--no-binary {package} {package}{version}`."
        )

    missing.__name__ = missing.__qualname__ = name
    return missing
