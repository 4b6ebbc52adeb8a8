"""The settings that are JSON, or the path of a file of it (around 7.1, 14).

Owns what is wrong with them. What they mean is ``mm.core.dataplane``'s and
``mm.core.constraints``'s; ``mm.config`` holds them.
"""

from __future__ import annotations

from pathlib import Path

from mm.core.constraints import NO_CONSTRAINTS, TypeConstraints, parse_type_constraints
from mm.core.dataplane import DataplaneConfig, parse_dataplane_config
from mm.core.static_models import StaticModel, parse_static_models
from mm.environment import Environment, wrong
from mm.errors import ConfigError


def dataplane_config(env: Environment) -> DataplaneConfig:
    """Answer which methods are served, by the variable; a file is read by whoever follows it."""
    name, path_name = "MM_DATAPLANE_CONFIG", "MM_DATAPLANE_CONFIG_PATH"
    env.not_both(name, path_name, "the JSON itself, or its file")
    text = env.text(name)
    if not text:
        return DataplaneConfig()
    try:
        return parse_dataplane_config(text)
    except ValueError as exc:
        shape = (
            '{"rpcConfigs": {"package.Service/Method": {"idExtractionPath": [1], '
            '"vModelId": false}}, "allowOtherRpcs": false}'
        )
        env.refuse(wrong(name, text, f"JSON like {shape}; {exc}"))
        return DataplaneConfig()


def type_constraints(env: Environment) -> TypeConstraints:
    """Answer the constraints of the variable; a file is read by whoever follows it."""
    name, path_name = "MM_TYPE_CONSTRAINTS", "MM_TYPE_CONSTRAINTS_PATH"
    env.not_both(name, path_name, "the JSON itself, or its file")
    text = env.text(name)
    if not text:
        return NO_CONSTRAINTS
    try:
        return parse_type_constraints(text)
    except ValueError as exc:
        shape = '{"type": {"required": ["label"], "preferred": ["label"]}}'
        env.refuse(wrong(name, text, f"JSON like {shape}; {exc}"))
        return NO_CONSTRAINTS


def existing_file(env: Environment, *names: str) -> str:
    """Answer the path of a file that is there, empty if unset; its content may change later."""
    path = env.text(*names)
    if not path:
        return ""
    name = next(each for each in names if env.is_set(each))
    if not Path(path).is_file():
        directory = ", not a directory" if Path(path).is_dir() else ""
        env.refuse(wrong(name, path, f"a file that exists{directory}"))
    return path


def static_models(env: Environment) -> tuple[StaticModel, ...]:
    """Answer the models of the variable; a file of more is read by whoever follows it."""
    found = env.find("MM_AUTO_REGISTER_MODELS", "MM_AUTO_REGISTER_MODEL")
    if found is None or not found[1].strip():
        return ()
    name, text = found
    try:
        return parse_static_models(text, name)
    except ValueError as exc:
        # The value itself is not repeated: a `key` in it may hold credentials.
        shape = '[{"modelId": "id", "modelInfo": {"type": "type", "path": "path"}}]'
        env.refuse(ConfigError(f"{name} is not valid: {exc}; allowed: JSON like {shape}"))
        return ()
