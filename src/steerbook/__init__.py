"""Fine-tuning and alignment recipes on transformers, PEFT and TRL.

Importing `steerbook` makes PEFT know our methods, so that `PeftModel.from_pretrained` and `AutoModel.from_pretrained`
load their adapters. It costs nothing until PEFT is imported: the registration runs right after that.
"""

import importlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"


def _register() -> None:
    # A tuner's package registers itself; while it is being imported (it imports PEFT), it must not be entered again.
    if "steerbook.trainers.lofit" not in sys.modules:
        importlib.import_module("steerbook.trainers.lofit")


class _AfterPeft(importlib.abc.MetaPathFinder):
    """Runs `_register` when PEFT has been imported. PEFT offers no entry point for methods from outside."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        # Being asked for the spec does not mean that PEFT is imported: transformers' is_peft_available() only looks.
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterPeft())
