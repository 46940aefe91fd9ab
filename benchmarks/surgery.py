"""Every classifier of torchvision with half of its channels gone: prunekit beside Torch-Pruning.

    python benchmarks/surgery.py run --peer path/to/python --json surgery.json --picture surgery.png

`--peer` is a Python that has Torch-Pruning beside torch and torchvision; without it prunekit runs alone. Each model and
tool runs in a process of its own, on one thread, the two tools of a model one after the other. Seconds are those of
reading the network, grouping, planning and editing; the proof is timed apart. CPU seconds are what counts where other
work shares the machine. Both tools get random weights, no setting
of the model's own, and rank filters by their L2 norm. Rows that the JSON file holds already are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

TOOLS = ("prunekit", "torch-pruning")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="all models, table and picture")
    run.add_argument("--peer", help="a Python with Torch-Pruning")
    run.add_argument("--json", type=Path, default=Path("surgery.json"))
    run.add_argument("--picture", type=Path)
    run.add_argument("--limit", type=int, default=120, help="CPU seconds for one model and tool, all told")
    run.add_argument("--tools", nargs="*", choices=TOOLS, default=TOOLS)
    run.add_argument("--models", nargs="*", help="some models (default: all of torchvision.models)")
    one = commands.add_parser("serve", help="models from standard input, rows to standard output")
    one.add_argument("tool", choices=TOOLS)
    one.add_argument("--limit", type=int, default=120)
    table = commands.add_parser("table", help="table and picture of finished rows")
    table.add_argument("json", type=Path)
    table.add_argument("--picture", type=Path)
    args = parser.parse_args()
    if args.command == "serve":
        return serve(args.tool, args.limit)
    rows = run_all(args) if args.command == "run" else json.loads(args.json.read_text())
    show(rows)
    if args.picture:
        draw(rows, args.picture)
    return None


def run_all(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rows by "tool model"; written after each one."""
    import torchvision

    names = args.models or torchvision.models.list_models(module=torchvision.models)
    rows: dict[str, dict[str, Any]] = json.loads(args.json.read_text()) if args.json.exists() else {}
    servers = {"prunekit": sys.executable, "torch-pruning": args.peer}
    asked = {tool: _start(servers[tool], tool, args.limit) for tool in args.tools if servers[tool]}
    for name in names:
        for tool, server in asked.items():
            if f"{tool} {name}" not in rows:
                assert server.stdin is not None
                assert server.stdout is not None
                server.stdin.write(f"{name}\n")
                server.stdin.flush()
                rows[f"{tool} {name}"] = row = json.loads(server.stdout.readline())
                args.json.write_text(json.dumps(rows, indent=1))
                print(f"{tool:14} {name:20} {row.get('seconds', '')} {row.get('error', '')}", flush=True)
    for server in asked.values():
        server.communicate()
    return rows


def _start(python: str, tool: str, limit: int) -> subprocess.Popen[str]:
    command = [python, __file__, "serve", tool, "--limit", str(limit)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def serve(tool: str, limit: int) -> None:
    """Import once, then fork a process for each model that is named on standard input."""
    import torch
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    if tool == "prunekit":
        from prunekit import prune  # noqa: F401, with all that it needs
    else:
        import torch_pruning  # noqa: F401
    gc.collect()
    gc.freeze()  # what was imported is no garbage, and a search through it would copy the server's memory
    for line in sys.stdin:
        name = line.strip()
        print(json.dumps(measured_in_a_process(lambda: measure(tool, name), limit)), flush=True)  # noqa: B023


def measured_in_a_process(measure: Callable[[], dict[str, Any]], limit: int) -> dict[str, Any]:
    """What `measure` returns in a forked process, or the error that it ends with; `limit` is in CPU seconds."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        with os.fdopen(writer, "w") as pipe:
            try:
                pipe.write(json.dumps(measure()))
            except Exception as error:  # whatever it is, it is the result
                pipe.write(json.dumps({"error": f"{type(error).__name__}: {error}"[:200]}))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGXCPU:
        return {"error": f"no end within {limit} s"}
    result: dict[str, Any] = json.loads(told) if told else {"error": f"died with status {status}"}
    return result


def measure(tool: str, name: str) -> dict[str, Any]:
    """Prune one model with one tool and say what it took."""
    import torch

    prune = _with_prunekit if tool == "prunekit" else _with_torch_pruning
    before = _memory("VmRSS")
    model = build(name)
    size = 299 if name == "inception_v3" else 224
    x = torch.randn(1, 3, size, size)
    params = sum(p.numel() for p in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    clock = Stopwatch()
    row, small, proof = prune(model, x, clock)
    row["peak_mib"] = round(_memory("VmHWM") - before, 1)
    after = sum(p.numel() for p in small.parameters())
    row |= {"params_before": params, "params_after": after} | proof()
    shape, macs = _run_without_values(small, x)
    if shape != [1, 1000]:
        return {"error": f"an output of shape {shape}"}
    return row | {"macs_after": macs, "seconds": clock.wall, "cpu_seconds": clock.cpu}


def build(name: str) -> Any:
    """The model with random weights."""
    import torchvision

    with without_drawing() as fill:
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **extra).eval()
        fill(model)
    return model


@contextlib.contextmanager
def without_drawing() -> Iterator[Callable[[Any], None]]:
    """Models that are made here draw no weights, which takes longer than pruning; gives a function that fills them."""
    import torch
    from torch import nn

    table = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def fill(model: nn.Module) -> None:
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 or key.endswith("bias"):
                gain = (2 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.01
                flat = parameter.view(-1)
                for start in range(0, flat.numel(), table.numel()):
                    part = flat[start : start + table.numel()]
                    torch.mul(table[: part.numel()], gain, out=part)

    drawing = [f for f in dir(nn.init) if f.endswith("_") and f[0] != "_" and f not in ("ones_", "zeros_", "constant_")]
    with contextlib.ExitStack() as stack:
        for function in drawing:
            stack.enter_context(mock.patch.object(nn.init, function, lambda tensor, *_, **__: tensor))
        yield fill


def _run_without_values(model: Any, x: Any) -> tuple[list[int], int]:
    """The shape of the output, and the MACs."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model.eval().to("meta")(x.to("meta"))
    return list(output.shape), counter.get_total_flops() // 2


class Stopwatch:
    """Wall and CPU seconds of what ran inside `with`."""

    def __enter__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall = round(time.perf_counter() - self._start[0], 3)
        self.cpu = round(time.process_time() - self._start[1], 3)


def _memory(kind: str) -> float:
    """A field of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind))


def _with_prunekit(model: Any, x: Any, clock: Stopwatch) -> tuple[dict[str, Any], Any, Callable[[], dict[str, Any]]]:
    from prunekit import surgery

    with clock:
        graph = surgery.trace(model, x)
        plan = half_of_each_group(model, graph)
        small = surgery.edit(model, plan, graph)

    def proof() -> dict[str, Any]:
        watch = Stopwatch()
        with watch:
            difference = surgery.verify(model, small, plan, graph)
        return {"difference": difference, "verify_seconds": watch.wall}

    return {"ops": len(graph.nodes), "prunable": prunable(graph)}, small, proof


def half_of_each_group(model: Any, graph: Any, share: float = 0.5, round_to: int = 1) -> Any:
    """Remove the channels of the smallest L2 norm, the same share of each group."""
    import numpy as np
    import torch

    import prunekit as pk

    tensors = dict(model.named_parameters())
    scores, keeps = {}, {}
    for group in graph.groups:
        score = np.zeros(group.size)
        for member in group.producers:
            rows = tensors[member.parameter].detach().movedim(member.dim, 0)
            norms = torch.linalg.vector_norm(rows.reshape(rows.size(0), -1), dim=1).square().numpy()
            np.add.at(score, member.units, norms[member.positions])
        scores[group.name] = score
        free = np.array(group.free, dtype=np.int64)
        stays = np.ones(group.size, dtype=bool)
        stays[free[np.argsort(score[free], kind="stable")[: int(free.size * share)]]] = False
        if not stays.all():
            keeps[group.name] = np.flatnonzero(stays).tolist()
    keeps = pk.surgery.balanced(graph, pk.round_widths(graph.groups, scores, keeps, round_to), scores, round_to)
    return pk.Plan([pk.Keep(name, index) for name, index in keeps.items()])


def prunable(graph: Any) -> float:
    """The share of parameters that lie in a channel which may go."""
    import numpy as np

    free = np.zeros(graph.group_of.size, dtype=bool)
    for number, group in enumerate(graph.groups):
        own = np.flatnonzero(graph.group_of == number)
        free[own] = np.isin(graph.unit_of[own], group.free)
    shapes = {name: shape for name, shape in graph.shapes.items() if name in graph.parameters}
    stuck = {key: int((~free[classes]).sum()) for key, classes in graph.slots.items()}
    return _share(shapes, stuck)


def _share(shapes: Mapping[str, tuple[int, ...]], stuck: Mapping[tuple[str, int], int]) -> float:
    total = core = 0
    for name, shape in shapes.items():
        whole = part = 1
        for dim, size in enumerate(shape):
            whole *= size
            part *= stuck.get((name, dim), size)
        total, core = total + whole, core + part
    return round(1 - core / total, 4)


def _with_torch_pruning(
    model: Any, x: Any, clock: Stopwatch
) -> tuple[dict[str, Any], Any, Callable[[], dict[str, Any]]]:
    import torch_pruning as tp
    from torch import nn

    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    heads += [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 1000]

    with clock:
        pruner = tp.pruner.MagnitudePruner(
            model, x, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=heads
        )
        pruner.step()
    return {}, model, lambda: {"prunable": _prunable_by_peer(pruner, model)}


def _prunable_by_peer(pruner: Any, model: Any) -> float:
    """The same share for the peer: elements at an index that one of its groups covers, in the pruned network."""
    names = {id(p): name for name, p in model.named_parameters()}
    covered: dict[tuple[str, int], set[int]] = {}
    for group in pruner.DG.get_all_groups(
        ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
    ):
        for dependency, index in group:
            module = dependency.target.module
            out = pruner.DG.is_out_channel_pruning_fn(dependency.handler)
            for parameter in [module] if id(module) in names else getattr(module, "parameters", list)():
                dim = 0 if out else 1
                if id(parameter) in names and dim < parameter.dim():
                    covered.setdefault((names[id(parameter)], dim), set()).update(index)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return _share(shapes, {(n, d): max(0, shapes[n][d] - len(index)) for (n, d), index in covered.items()})


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The table as Markdown, and what it comes to."""
    names = sorted({key.split(" ")[1] for key in rows})
    print(
        "| model | ops | seconds | peer | peak MiB | peer | prunable | peer | parameters left | MACs after | verified |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in names:
        own, peer = (rows.get(f"{tool} {name}", {}) for tool in TOOLS)
        left = f"{own['params_after'] / own['params_before']:.3f}" if "params_after" in own else ""
        cells = [
            *(name, own.get("ops", ""), own.get("cpu_seconds", own.get("error", ""))),
            *(peer.get("cpu_seconds", peer.get("error", "")), own.get("peak_mib", ""), peer.get("peak_mib", "")),
            *(own.get("prunable", ""), peer.get("prunable", ""), left),
            *(f"{own.get('macs_after', 0) / 1e6:.0f} M", f"{own.get('difference', float('nan')):.0e}"),
        ]
        print("| " + " | ".join(str(cell) for cell in cells) + " |")
    _sum_up(rows, names)


def _sum_up(rows: Mapping[str, Mapping[str, Any]], names: list[str]) -> None:
    done = {tool: [n for n in names if "seconds" in rows.get(f"{tool} {n}", {})] for tool in TOOLS}
    for tool in TOOLS:
        tried = [n for n in names if f"{tool} {n}" in rows]
        print(f"\n{tool}: {len(done[tool])} of {len(tried)}")
    both = [(rows[f"prunekit {n}"], rows[f"torch-pruning {n}"]) for n in done["prunekit"] if n in done["torch-pruning"]]
    slowest = max(done["prunekit"], key=lambda n: rows[f"prunekit {n}"]["cpu_seconds"])
    print(f"slowest: {slowest}, {rows[f'prunekit {slowest}']['cpu_seconds']} CPU seconds")
    if both:
        for kind in ("seconds", "cpu_seconds"):
            ratio = statistics.median(own[kind] for own, _ in both) / statistics.median(peer[kind] for _, peer in both)
            each = statistics.median(own[kind] / peer[kind] for own, peer in both)
            print(f"{kind}: ratio of the medians {ratio:.2f}, median of the ratios {each:.2f}")
        print(f"less memory: {sum(own['peak_mib'] <= peer['peak_mib'] for own, peer in both)} of {len(both)}")
        print(f"no less prunable: {sum(own['prunable'] >= peer['prunable'] for own, peer in both)} of {len(both)}")


def draw(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Seconds against the number of ops."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for tool, colour, marker in zip(TOOLS, ("#0072B2", "#D55E00"), "ox", strict=True):
        ops = {n.split(" ")[1]: row["ops"] for n, row in rows.items() if "ops" in row}
        points = [
            (ops[key.split(" ")[1]], row["cpu_seconds"])
            for key, row in rows.items()
            if key.startswith(tool) and "seconds" in row and key.split(" ")[1] in ops
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=18, c=colour, marker=marker, label=tool)
    axes.set(xscale="log", yscale="log", xlabel="ops in one forward", ylabel="CPU seconds: trace, group, plan, edit")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
