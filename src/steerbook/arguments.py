"""The command line of a recipe."""

from __future__ import annotations

from typing import Any, NoReturn

import yaml
from trl import TrlParser


class RecipeParser(TrlParser):
    """TrlParser for people: bad values raise ValueError (argparse would print some 250 flags first), abbreviations are
    errors (a mistyped flag would pass for another one), and YAML may give one value where a list is expected."""

    def __init__(self, dataclass_types: Any, **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists all flags)")

    def parse_args_and_config(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().parse_args_and_config(*args, **kwargs)
        except yaml.YAMLError as error:
            raise ValueError(f"--config is not YAML: {error}") from error

    def set_defaults_with_config(self, **values: Any) -> Any:
        lists = {action.dest for action in self._actions if action.nargs == "+"}
        for name in lists & values.keys():
            if values[name] is not None and not isinstance(values[name], list):
                values[name] = [values[name]]
        return super().set_defaults_with_config(**values)
