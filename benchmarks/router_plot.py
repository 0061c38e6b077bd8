"""The picture of what `router.py` measured: time over N for each shape, both axes logarithmic.

    python benchmarks/router_plot.py benchmarks/results/router_h200.json out.png

draws it again from the report, without a GPU. Needs the plot extra.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from contest import OURS
from problem import TOP_K
from router_result import (
    COMPILED,
    COMPUTE,
    CUBLAS,
    EAGER,
    MEMORY,
    RECORDED,
    Result,
    shapes,
)

GATED = "cuBLAS + gate"
STYLES: dict[str, dict[str, Any]] = {
    OURS: {"color": "#d1495b", "linewidth": 2.6, "marker": "o", "zorder": 5},
    RECORDED: {"color": "#30638e", "marker": "s", "linestyle": "none", "zorder": 4},
    GATED: {"color": "#7aa6c2", "marker": "P"},
    CUBLAS: {"color": "#6c9a8b", "marker": "^"},
    EAGER: {"color": "#8d8d8d", "marker": "D"},
    COMPILED: {"color": "#b9b9b9", "marker": "v"},
    MEMORY: {"color": "#222222", "linestyle": (0, (4, 3)), "linewidth": 1.2, "marker": ""},
    COMPUTE: {"color": "#222222", "linestyle": (0, (1, 2)), "linewidth": 1.4, "marker": ""},
}


def main() -> int:
    """Draw a report."""
    parser = argparse.ArgumentParser(description="Draw what benchmarks/router.py measured.")
    parser.add_argument("report", type=Path, help="what router.py wrote with --json")
    parser.add_argument("picture", type=Path, help="where to draw it")
    args = parser.parse_args()
    report = json.loads(args.report.read_text())
    results = [Result.from_dict(found) for found in report["results"]]
    plot(results, title(report["environment"]), args.picture)
    return 0


def title(where: dict[str, Any]) -> str:
    """What the picture says of where it was measured."""
    return f"{where['gpu']}, {where['date']}"


def curves(results: list[Result]) -> dict[str, list[tuple[int, float]]]:
    """The points (N, us) of the curves that have any, by their names in `STYLES`."""
    found: dict[str, list[tuple[int, float]]] = {}
    for r in sorted(results, key=lambda r: r.N):
        times = r.times | ({GATED: r.gated[0]} if r.gated else {})
        for name in STYLES:
            if name in times:
                found.setdefault(name, []).append((r.N, times[name]))
    return found


def gates(results: list[Result]) -> str:
    """Whose gates stand behind cuBLAS in these results: "own gate", or the names of several."""
    names = dict.fromkeys(r.gated[1].removeprefix("cuBLAS + ") for r in results if r.gated)
    return " or ".join(names)


def plot(results: list[Result], title: str, path: Path) -> None:
    """Draw a panel for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    labels = {name: name for name in STYLES} | {GATED: f"cuBLAS + {gates(results)}"}
    figure, panels = pyplot.subplots(
        nrows=1,
        ncols=len(shapes(results)),
        figsize=(7.2 * len(shapes(results)), 6.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, (E, K) in zip(panels[0], shapes(results), strict=True):
        rows = [r for r in results if (r.E, r.K) == (E, K)]
        for name, points in curves(rows).items():
            panel.plot(
                *zip(*points, strict=True),
                **{"label": labels[name], "markersize": 5, "linewidth": 1.5} | STYLES[name],
            )
        for r in rows:
            panel.annotate(
                f"{r.us[OURS]:.3g}",
                (r.N, r.us[OURS]),
                xytext=(0, -14),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=STYLES[OURS]["color"],
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.margins(x=0.04)
        # The compute floor of few tokens is nanoseconds: it may enter the panel from below.
        panel.set_ylim(bottom=min(r.floors[MEMORY] for r in results) / 1.5)
        panel.xaxis.set_major_locator(FixedLocator(sorted(r.N for r in rows)))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.tick_params(axis="x", labelsize=8)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_xlabel("tokens N")
        panel.set_title(f"E={E}, K={K}, top {TOP_K}", loc="left", fontsize=11)
        panel.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("microseconds per call")
    lines, said = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, said, loc="outside lower center", ncols=len(said), frameon=False)
    figure.suptitle(f"MoE router: hidden states to experts  ({title})", x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
