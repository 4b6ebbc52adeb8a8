"""The settings that are JSON, or the path of a file of it (around 7.1, 14).

Owns what is wrong with them. What they mean is ``mm.core.dataplane``'s and
``mm.core.constraints``'s; ``mm.config`` holds them.
"""

from __future__ import annotations

from pathlib import Path

from mm.core.constraints import NO_CONSTRAINTS, TypeConstraints, parse_type_constraints
from mm.core.dataplane import DataplaneConfig, parse_dataplane_config
from mm.environment import Environment, wrong


def dataplane_config(env: Environment) -> DataplaneConfig:
    """Answer which methods are served, by the variable; a file is read by whoever follows it."""
    name, path_name = "MM_DATAPLANE_CONFIG", "MM_DATAPLANE_CONFIG_PATH"
    env.not_both(name, path_name, "the JSON itself, or its file")
    text = env.text(name)
    if text is None:
        return DataplaneConfig()
    try:
        return parse_dataplane_config(text)
    except ValueError as exc:
        shape = (
            '{"rpcConfigs": {"package.Service/Method": {"idExtractionPath": [1], '
            '"vModelId": false}}, "allowOtherRpcs": false}'
        )
        raise wrong(name, text, f"JSON like {shape}; {exc}") from exc


def type_constraints(env: Environment) -> TypeConstraints:
    """Answer the constraints of the variable; a file is read by whoever follows it."""
    name, path_name = "MM_TYPE_CONSTRAINTS", "MM_TYPE_CONSTRAINTS_PATH"
    env.not_both(name, path_name, "the JSON itself, or its file")
    text = env.text(name)
    if text is None:
        return NO_CONSTRAINTS
    try:
        return parse_type_constraints(text)
    except ValueError as exc:
        shape = '{"type": {"required": ["label"], "preferred": ["label"]}}'
        raise wrong(name, text, f"JSON like {shape}; {exc}") from exc


def existing_file(env: Environment, name: str) -> str:
    """Answer the path of a file that is there, empty if unset; its content may change later."""
    path = env.text(name)
    if path is None:
        return ""
    if not Path(path).is_file():
        raise wrong(name, path, "a file that exists")
    return path
