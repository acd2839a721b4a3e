"""Makes ``--model dynamax`` known to lm-eval 0.4.13, which has no plug-in discovery.

torch calls :func:`register` at the end of ``import torch`` (entry-point group ``torch.backends``, by way of
``_dynamax_lm_eval_autoload``), and the harness imports torch to seed it before it looks the model up. So this file must
cost nothing and must not fail: it knows the standard library only, does not import lm_eval, and swallows every error
(``dynamax-lm-eval run`` works without it).

Errors of the user, which nothing in the harness's command handles, end in one line there, as in ours.

If ``lm_eval.models`` is loaded already, the model is registered at once. Otherwise an import hook waits
for that one module and registers after it has run: earlier would make the harness believe its registry
is filled, and hide every built-in model.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, TracebackType

MODEL_NAME = "dynamax"
TARGET = "dynamax_lm_eval.lm:DynamaxLM"
_AWAITED = "lm_eval.models"
_COMMAND = "lm_eval._cli.run"


def register() -> None:
    """Registers the model now or as soon as ``lm_eval.models`` is imported. Never raises."""
    try:
        if _COMMAND in sys.modules:
            _end_in_one_line()
        if _AWAITED in sys.modules and not _is_importing(sys.modules[_AWAITED]):
            add_to_registry()
        elif not any(isinstance(finder, _OneShotFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _OneShotFinder())
    except Exception:
        return


def add_to_registry() -> None:
    """Enters the lazy target under the name ``dynamax``; does nothing where the name is taken."""
    registry = sys.modules["lm_eval.api.registry"].model_registry
    if MODEL_NAME not in registry:
        registry.register(MODEL_NAME, target=TARGET)


def _end_in_one_line() -> None:
    """Has errors of the user end the harness's command in one line; at log level DEBUG the traceback is shown."""
    before = sys.excepthook
    if getattr(before, "_dynamax", False):
        return

    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        errors = sys.modules.get("dynamax_lm_eval.errors")
        is_debugged = logging.getLogger("lm_eval").isEnabledFor(logging.DEBUG)
        if errors is None or is_debugged or not isinstance(error, errors.UserError):
            before(kind, error, traceback)
        else:
            sys.stderr.write(f"dynamax-lm-eval: error: {' '.join(str(error).split())}\n")

    show._dynamax = True  # type: ignore[attr-defined]
    sys.excepthook = show


def _is_importing(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


class _OneShotFinder(MetaPathFinder):
    """Steps aside for all modules but ``lm_eval.models``, and for that one after its first import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Registering(spec.loader, self)
                return spec
        return None


class _Registering(Loader):
    """Runs the real loader, gives the module its real loader back, removes the hook, then registers."""

    def __init__(self, loader: Loader, finder: MetaPathFinder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        try:
            sys.meta_path.remove(self._finder)
            add_to_registry()
        except Exception:
            return
