"""Group configurations: how many groups each layer gets, as files.

The published JSON shape is ``{"module.layer1.0.conv1": {"G": 2, "F": 64, "C": 64, "id": 3}}``; the short one is
``{"layer1.0.conv1": 2}``. A Python file may hold either, as ``groups = dict(...)``; it is read, never run.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_mm.files import write_text_atomically
from prune_mm.pruners.options import check_integer
from prune_mm.structures.json_text import one_line, read_json, read_text

#: Names that wrappers and models put before those of the layers.
PREFIXES = ("module", "model", "_orig_mod", "backbone")
#: The name a Python file must give its groups.
VARIABLE = "groups"
#: Longest file; a network of a thousand layers takes a tenth of it.
MAX_BYTES = 1 << 20
#: Longest name of a layer.
MAX_NAME = 500


@dataclass(frozen=True)
class GroupEntry:
    """What a configuration says about a layer.

    Attributes:
        groups: G, at least 1.
        out_channels: F, or None when it is not given.
        in_channels: C, or None when it is not given.
    """

    groups: int
    out_channels: int | None = None
    in_channels: int | None = None


def read_groups(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, GroupEntry]:
    """Read a configuration from a JSON or Python file, or from a dict of the same content.

    Args:
        source: path, or dict by layer name of counts or of ``{"G":, "F":, "C":}`` (``id`` and others are ignored).

    Returns:
        Entries by the names in the file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file or layer and what is wrong; also for G = -1, a template's blank.
    """
    if isinstance(source, Mapping):
        return _entries(source, "groups")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no group configuration at '{path}'")
    try:
        text = read_text(path, MAX_BYTES)
        data = _parse_python(text) if path.suffix == ".py" else read_json(text)
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        reason = one_line(error) or "it is nested too deeply"
        raise ValueError(f"'{path}' is not a group configuration: {reason}") from error
    if not isinstance(data, dict):
        raise ValueError(f"'{path}' holds a {type(data).__name__}, not groups by layer name")
    try:
        return _entries(data, f"'{path}'")
    except ValueError as error:
        raise ValueError(one_line(error)) from error


def match_groups_to_layers(
    entries: Mapping[str, GroupEntry],
    layers: Mapping[str, tuple[int, int]],
    prefixes: Sequence[str] = PREFIXES,
) -> dict[str, int]:
    """Give every layer its group count.

    Args:
        entries: from :func:`read_groups`; prefixes before the layers' names do not matter.
        layers: output and input channels (F, C) by name.
        prefixes: dotted parts that may come before a layer's name, in any number.

    Returns:
        Group counts by layer name, in the order of ``layers``; 1 for a layer that has no entry.

    Raises:
        ValueError: an entry names no layer (with the nearest names), names the same layer as another, was written for
            other channel counts, or has a count that does not divide them.
    """
    named: dict[str, str] = {}
    counts = dict.fromkeys(layers, 1)
    for key, entry in entries.items():
        name = layer_of(key, layers, prefixes)
        if name in named:
            raise ValueError(f"'{named[name]}' and '{key}' are the same layer '{name}'; keep one")
        named[name] = key
        _check_fit(name, entry, layers[name])
        counts[name] = entry.groups
    return counts


def mcpg(out_channels: int, in_channels: int, channels_per_group: int) -> int:
    """Group count by the most channels a group may have: max(F, C) / M.

    Args:
        out_channels: F.
        in_channels: C.
        channels_per_group: M, of the wider side.

    Returns:
        G; or 1, with a warning, where M does not divide the wider side or G does not divide the narrower one.

    Raises:
        ValueError: naming an argument that is no positive whole number.

    Warns:
        UserWarning: when the layer cannot be grouped in this way.

    Source: option --mcpg of the published code.
    """
    check_integer("out_channels", out_channels, 1)
    check_integer("in_channels", in_channels, 1)
    check_integer("channels_per_group", channels_per_group, 1)
    groups, rest = divmod(max(out_channels, in_channels), channels_per_group)
    if rest or min(out_channels, in_channels) % max(groups, 1):
        warnings.warn(
            f"a layer of {out_channels} outputs and {in_channels} inputs cannot have {channels_per_group} channels "
            "per group; it stays dense",
            stacklevel=2,
        )
        return 1
    return groups


def write_groups(
    path: str | os.PathLike,
    groups: Mapping[str, int],
    layers: Mapping[str, tuple[int, int]],
    overwrite: bool = False,
    prefix: str = "",
) -> None:
    """Write a configuration in the published JSON shape, at once or not at all.

    Args:
        path: file to write; its folder is created.
        groups: counts by layer name.
        layers: output and input channels (F, C) of at least these layers; ``id`` is the place among them.
        overwrite: replace a file that is there.
        prefix: put before every name, such as ``'module.'`` for the published tools.

    Raises:
        FileExistsError: the file exists and may not be replaced.
        ValueError: a layer is unknown or its count does not divide its channels.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"'{path}' exists; choose another file or ask to overwrite it")
    data, places = {}, {name: place for place, name in enumerate(layers)}
    for name, count in groups.items():
        if name not in layers:
            raise ValueError(f"'{name}' is no layer{_nearest(name, layers)}")
        check_integer(f"groups of '{name}'", count, 1)
        _check_fit(name, GroupEntry(count), layers[name])
        out_channels, in_channels = layers[name]
        data[prefix + name] = {"G": int(count), "F": int(out_channels), "C": int(in_channels), "id": places[name]}
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in data.items()]
    write_text_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _entries(data: Mapping[str, Any], where: str) -> dict[str, GroupEntry]:
    """Check every value of a configuration."""
    entries = {}
    for name, value in data.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > MAX_NAME:
            raise ValueError(f"{where}: {name!r:.80} is no layer name")
        fields = value if isinstance(value, Mapping) else {"G": value}
        if "G" not in fields:
            raise ValueError(f"{where}: the entry of '{name}' has no group count 'G'")
        if fields["G"] == -1:
            raise ValueError(f"{where}: 'G' of '{name}' is -1, the blank of a template; write a count, or 1 for dense")
        numbers = {}
        for key in ("G", "F", "C"):
            if key in fields:
                check_integer(f"{where}: '{key}' of '{name}'", fields[key], 1)
                numbers[key] = int(fields[key])
        entries[name] = GroupEntry(numbers["G"], numbers.get("F"), numbers.get("C"))
    return entries


def layer_of(key: str, layers: Mapping[str, Any], prefixes: Sequence[str] = PREFIXES) -> str:
    """The layer an entry names, once prefixes are taken off."""
    name = key
    while name not in layers:
        head, dot, rest = name.partition(".")
        if not dot or head not in prefixes:
            raise ValueError(f"the group configuration names '{key}', which is no layer{_nearest(name, layers)}")
        name = rest
    return name


def _nearest(name: str, layers: Mapping[str, Any]) -> str:
    found = difflib.get_close_matches(name, layers, n=3, cutoff=0.5) or list(layers)[:3]
    return f" that can be grouped; the nearest are: {', '.join(found)}" if found else "; there are none to group"


def _check_fit(name: str, entry: GroupEntry, channels: tuple[int, int]) -> None:
    for what, given, real in zip(
        ("F (output channels)", "C (input channels)"), (entry.out_channels, entry.in_channels), channels
    ):
        if given is not None and given != real:
            raise ValueError(
                f"the group configuration has {what} = {given} for '{name}', but the layer has {real}: "
                "it was written for another network"
            )
    if any(count % entry.groups for count in channels):
        raise ValueError(
            f"'{name}' cannot have {entry.groups} groups: it has {channels[0]} outputs and {channels[1]} inputs, "
            f"so the count must divide {math.gcd(*channels)}"
        )


class _DictCalls(ast.NodeTransformer):
    """``dict(a=1, **{'b': 2})`` as the literal ``{'a': 1, 'b': 2}``, which can be evaluated without running code."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replace a call of ``dict``; leave others, which are then refused."""
        self.generic_visit(node)
        if not isinstance(node.func, ast.Name) or node.func.id != "dict" or len(node.args) > 1:
            return node
        keys: list[ast.expr | None] = []
        values: list[ast.expr] = []
        for name, value in [*((None, arg) for arg in node.args), *((k.arg, k.value) for k in node.keywords)]:
            if name is not None:
                keys.append(ast.Constant(name))
                values.append(value)
            elif isinstance(value, ast.Dict):
                keys.extend(value.keys)
                values.extend(value.values)
            else:
                return node
        return ast.copy_location(ast.Dict(keys, values), node)


def _parse_python(text: str) -> Any:
    """The literal that a Python file assigns to ``groups``."""
    found = None
    for statement in ast.parse(text).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
        if any(isinstance(target, ast.Name) and target.id == VARIABLE for target in targets):
            found = statement
    if found is None or getattr(found, "value", None) is None:
        raise ValueError(f"it assigns nothing to '{VARIABLE}'")
    try:
        return ast.literal_eval(_DictCalls().visit(found.value))
    except ValueError as error:
        raise ValueError(
            f"'{VARIABLE}' must be written out as dicts, names and numbers; it is read, not run"
        ) from error
