"""Search group counts that fit a budget: ``tools/search_groups.py CONFIG --max-params 0.5 --out groups.json``."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from prune_mm.analysis import comparison_table
from prune_mm.analysis.group_plot import GroupBar, check_image_path, plot_groups
from prune_mm.engine.checkpoint import state_dict_of
from prune_mm.engine.compact import without_pretrained
from prune_mm.engine.launch import add_common_arguments, load_config, run_tool
from prune_mm.engine.prunable import image_size, with_preprocessor
from prune_mm.engine.reading import read_checkpoint
from prune_mm.engine.scope import get_scope, scope_positions, trace_scope
from prune_mm.graph import ChannelGraph, ConvLayer
from prune_mm.pruners.group_config import write_groups
from prune_mm.pruners.group_search import STRATEGIES, GroupSearch, run_group_search
from prune_mm.pruners.grouping import select_layers
from prune_mm.structures.plan import count_macs


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    parser.add_argument("--checkpoint", help="weights to search with, of the model or of its scope alone")
    parser.add_argument("--max-params", type=budget, help="parameters of the scope: a share such as 0.5, or 12M")
    parser.add_argument("--max-macs", type=budget, help="multiply-adds of the scope: a share such as 0.5, or 2.1G")
    parser.add_argument("--min-channels", type=int, default=1, help="fewest channels of a group, inputs and outputs")
    parser.add_argument("--max-groups", type=int, default=64, help="most groups of a layer")
    parser.add_argument("--allow-depthwise", action="store_true", help="let layers become depthwise")
    parser.add_argument("--absolute", action="store_true", help="weigh layers by their norm instead of equally")
    parser.add_argument("--strategy", choices=STRATEGIES, help="MAX_COST: as published (default: OPTIMAL)")
    parser.add_argument("--published", action="store_true", help="the published search, which ends above the budget")
    parser.add_argument("--scope", default="backbone", help="what to search, where the config does not say")
    parser.add_argument("--input-size", type=int, nargs="+", default=[224], help="likewise: side, or height and width")
    parser.add_argument("--out", required=True, help="JSON file of the group counts")
    parser.add_argument("--plot", help="also draw them, layer by layer, into this image")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    return parser.parse_args()


def budget(text: str) -> float | str:
    """A number as a float, of which those up to 1 are shares; text with a unit as it is."""
    try:
        return float(text)
    except ValueError:
        return text


def build_dense(config: Config, args: argparse.Namespace) -> tuple[nn.Module, str, tuple[int, int]]:
    """The dense model without pretrained weights, and the scope and image size to search for."""
    model, size = config.model, args.input_size
    dense, scope, size = model, args.scope, size[0] if len(size) == 1 else size
    if str(model.get("type")).rpartition(".")[2] == "PrunableModel":
        dense, scope, size = model.model, model.get("scope", "backbone"), model.get("input_size", 224)
    init_default_scope(config.get("default_scope", "mmengine"))
    settings = with_preprocessor(without_pretrained(dense), config.get("data_preprocessor"))
    return MODELS.build(settings), scope, image_size(size)


def groupable(graph: ChannelGraph, config: Config) -> list[ConvLayer]:
    """The convolutions a pruner would divide, with the options of the config's own pruner if it divides any."""
    pruner = (config.model.get("pruner") or {}) if "model" in config.model else {}
    return select_layers(graph, pruner.get("ignore", ()), pruner.get("include_frozen", False))[0]


def load_weights(path: str, scope: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights from a checkpoint of the model, or of the scope alone.

    Raises:
        FileNotFoundError: when there is no checkpoint.
        ValueError: when it lacks a weight or has it in another shape.
    """
    state = state_dict_of(read_checkpoint(path), f"'{path}'")
    found = {}
    for name, weight in weights.items():
        tensor = state.get(f"{scope}.{name}.weight", state.get(f"{name}.weight"))
        if tensor is None or tensor.shape != weight.shape:
            what = "no such weight" if tensor is None else f"shape {tuple(tensor.shape)}, not {tuple(weight.shape)}"
            raise ValueError(f"'{path}' is not a checkpoint of this model: '{scope}.{name}.weight' has {what}")
        found[name] = tensor
    return found


def search(
    module: nn.Module, layers: list[ConvLayer], weights: dict[str, Tensor], places: dict[str, int], args: Any
) -> GroupSearch:
    """Search with a progress bar; the budgets are those of the whole module."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    positions = {name: places[f"{name}.weight"] for name in weights}
    searched = sum(weight.numel() for weight in weights.values())
    all_macs = count_macs(shapes, {name: count for name, count in places.items() if name in shapes})
    columns = (TextColumn("solving layers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(weights))
        return run_group_search(
            weights,
            args.max_params,
            args.min_channels,
            fixed_params=sum(parameter.numel() for parameter in module.parameters()) - searched,
            max_macs=args.max_macs,
            fixed_macs=all_macs - sum(weights[name].numel() * count for name, count in positions.items()),
            positions=positions,
            bases={layer.name: layer.base for layer in layers},
            max_groups=args.max_groups,
            allow_depthwise=args.allow_depthwise,
            relative=not args.absolute,
            published=args.published,
            strategy=args.strategy,
            progress=lambda done, total: bar.update(task, completed=done),
        )


def show(result: GroupSearch, title: str) -> None:
    """Print what was found."""
    table = comparison_table(
        "",
        [
            ("parameters", result.dense_params, result.params, "params"),
            ("multiply-adds", result.dense_macs, result.macs, "macs"),
            ("kernel norm kept, %", 100.0, 100.0 * result.kept_ratio, "percent"),
            *(
                (f"layers with {count} groups" if count > 1 else "dense layers", None, number, "count")
                for count, number in sorted(Counter(result.groups.values()).items())
            ),
        ],
    )
    Console().print(f"\n[bold]{title}[/bold]", table, sep="\n")


def draw(result: GroupSearch, path: str, title: str) -> None:
    """Draw what was found."""
    bars = []
    for layer in result.layers:
        index = layer.counts.index(result.groups[layer.name])
        kept = layer.kept[index] / layer.norm if layer.norm else 1.0
        bars.append(GroupBar(layer.name, layer.counts[index], layer.params[0], layer.params[index], kept))
    plot_groups(path, bars, title)


def main() -> None:
    """Build, search, show, write."""
    args = parse_args()
    for path in filter(None, (args.out, args.plot)):
        if Path(path).exists() and not args.overwrite:
            raise FileExistsError(f"'{path}' exists; choose another file or pass --overwrite")
    if args.plot:
        check_image_path(args.plot)
    config = load_config(args)
    model, scope, size = build_dense(config, args)
    module = get_scope(model, scope)
    convs = groupable(trace_scope(model, scope, size, grouping=True), config)
    weights = {conv.name: module.get_submodule(conv.name).weight.detach() for conv in convs}
    if args.checkpoint:
        weights = load_weights(args.checkpoint, scope, weights)
    else:
        print("warning: without --checkpoint the search sees random weights; its counts mean little")
    result = search(module, convs, weights, scope_positions(model, scope, size), args)
    title = f"{type(model).__name__}: {scope} with searched group counts"
    show(result, title)
    layers = {layer.name: layer.shape[:2] for layer in result.layers}
    write_groups(args.out, result.groups, layers, overwrite=args.overwrite)
    if args.plot:
        shares = f"{result.params / result.dense_params:.0%} of the parameters, {result.macs / result.dense_macs:.0%}"
        draw(result, args.plot, f"{title}: {shares} of the MACs, {result.kept_ratio:.0%} of the kernel norm")
    print(f"\n{args.out}: group counts of {len(layers)} layers" + (f", drawn in {args.plot}" if args.plot else ""))


if __name__ == "__main__":
    run_tool(main)
