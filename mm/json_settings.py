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
    """Answer which methods are served, from the JSON or its file."""
    env.not_both("MM_DATAPLANE_CONFIG", "MM_DATAPLANE_CONFIG_PATH", "the JSON itself, or its file")
    name, value = "MM_DATAPLANE_CONFIG_PATH", env.text("MM_DATAPLANE_CONFIG_PATH")
    text: str | bytes | None
    if value is not None:
        try:
            text = Path(value).read_bytes()
        except OSError as exc:
            raise wrong(name, value, f"a readable JSON file ({exc.strerror})") from exc
    else:
        name = "MM_DATAPLANE_CONFIG"
        text = value = env.text(name)
    if text is None or value is None:
        return DataplaneConfig()
    try:
        return parse_dataplane_config(text)
    except ValueError as exc:
        shape = (
            '{"rpcConfigs": {"package.Service/Method": {"idExtractionPath": [1], '
            '"vModelId": false}}, "allowOtherRpcs": false}'
        )
        raise wrong(name, value, f"JSON like {shape}; {exc}") from exc


def type_constraints(env: Environment) -> TypeConstraints:
    """Answer the constraints of the variable; those of a file are read by whoever follows it."""
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


def type_constraints_path(env: Environment) -> str:
    """Answer the path of the file, which must be there; what is in it may be put right later."""
    name = "MM_TYPE_CONSTRAINTS_PATH"
    path = env.text(name)
    if path is None:
        return ""
    if not Path(path).is_file():
        raise wrong(name, path, "a file that exists")
    return path
