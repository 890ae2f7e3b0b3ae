"""From a config to its task: finds the function behind `task`, calls it, and checks its answer."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gaf_lab.data.problem import Problem
from gaf_lab.data.sampling import derive_seed
from gaf_lab.own_code import misfit
from gaf_lab.settings.checks import ConfigError, nearest
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.task_source import (
    FORM,
    hash_source,
    is_file,
    name_task,
    source_file,
    split_reference,
)

BUILT_IN = "gaf_lab.tasks.pictures:pictures"  # of a config without a task


def call_task(config: TrainConfig, folder: Path | None) -> Problem:
    """The problem that the config's task returns.

    The function gets the config, and, if it has a parameter `data`, the folder or file --data.
    Meanwhile torch's global generator is seeded from the config's seed, and restored afterwards.

    Raises:
        ConfigError: if there is no such function, or it returns something else.
    """
    reference = config.task or BUILT_IN
    function = find_function(reference, config.task_source)
    given: dict[str, Any] = {"data": folder} if takes_data(function) else {}
    if config.task and folder is not None and not given:
        raise ConfigError(
            f"task {name_task(reference)}: data must be left out for a function without a "
            f"parameter named data; got {folder}. Leave out --data, or write: "
            "def task(config, data)."
        )
    if seen := misfit(function, 1, *given):
        raise ConfigError(
            f"task {name_task(reference)}: the function must take one argument, the config, and "
            f"may take another named data; got {seen}. Give the others defaults."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "task"))
        try:
            found = function(config, **given)
        except ConfigError as error:
            raise (
                ConfigError(f"task {name_task(reference)}: {error}") if config.task else error
            ) from None
    if not isinstance(found, Problem):
        raise ConfigError(
            f"task {name_task(reference)}: the function must return a gaf_lab.Problem; "
            f"got {type(found).__name__}. Write: return Problem(model=..., loss=..., train=..., "
            "test=...)."
        )
    return found


def takes_data(function: Callable[..., Any]) -> bool:
    return "data" in inspect.signature(function).parameters


def find_function(reference: str, source: str) -> Callable[..., Any]:
    """The function of a reference whose source has this hash; "" for any."""
    place, name = split_reference(reference)
    path = source_file(place, reference)
    if source and hash_source(path) != source:
        raise ConfigError(
            f"task {name_task(reference)}: its source must be that of the config, {source}; "
            f"{path} has changed since, to {hash_source(path)}. Start anew, or put it back."
        )
    module = load_file(path, source) if is_file(place) else importlib.import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [word for word, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(
            f"task {name_task(reference)}: {path.name} must have a function {name!r}; "
            f"it has none.{nearest(name, known)} {FORM}"
        )
    return function  # type: ignore[no-any-return]


def load_file(path: Path, source: str) -> ModuleType:
    """Runs a file as a module, once for each content. It may import files beside it."""
    name = f"{path.stem}_{source}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
