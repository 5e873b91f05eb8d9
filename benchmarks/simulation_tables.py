"""What the runs of `simulation.py` come to: medians, ratios of pairs, floors, tables."""

from __future__ import annotations

from simulation_measure import Figures, losses, pair_ratios, spread

FLOORS = {"bag": 8.0, "lstm": 1.45, "lm": 1.35}
SHOWN = (
    "clients_per_second", "clients_per_cpu_second", "peak_memory_mib", "import_seconds",
    "setup_seconds", "first_iteration_seconds",
)


def compared(arms: dict[str, list[Figures]], model: str) -> Figures:
    """Medians of each arm, ratios of ours to the peer's, and of private to not private."""
    found: Figures = {
        "medians": {
            arm: {key: spread([run[key] for run in runs])["median"] for key in SHOWN}
            for arm, runs in arms.items() if runs
        },
        "loss": {arm: losses(runs) for arm, runs in arms.items() if runs},
    }
    mine, private, other = arms["none"], arms["example"], arms["pfl"]
    if mine and other:
        ratios = {key: pair_ratios(mine, other, key) for key in SHOWN}
        found["ratio_to_pfl"] = ratios
        found["floor"] = FLOORS[model]
        found["passed"] = ratios["clients_per_second"]["median"] >= FLOORS[model]
        found["loss_difference"] = found["loss"]["none"]["mean"] - found["loss"]["pfl"]["mean"]
    if mine and arms.get("blazefl"):
        found["ratio_to_blazefl"] = {
            key: pair_ratios(mine, arms["blazefl"], key) for key in SHOWN
        }
    if mine and private:
        share = pair_ratios(private, mine, "clients_per_second")
        found["private_over_not"] = share
        found["private_passed"] = share["median"] >= 0.5
    return found


def speedups(settings: list[Figures]) -> list[Figures]:
    """Clients per second of several workers over those of one, for each arm."""
    alone = {(s["model"], s["users"]): s for s in settings if s["workers"] == 1}
    found = []
    for several in settings:
        one = alone.get((several["model"], several["users"]))
        if several["workers"] > 1 and one is not None:
            found.append({
                "model": several["model"], "users": several["users"],
                "workers": several["workers"],
                "speedup": {
                    arm: figures["clients_per_second"] / one["medians"][arm]["clients_per_second"]
                    for arm, figures in several["medians"].items()
                },
            })
    return found


def table(result: Figures) -> str:
    """The comparison as Markdown."""
    lines = [
        "| model | users | workers | ours, clients/s | pfl, clients/s | ratio (least to largest) | "
        "memory, MiB: ours, pfl | private / not |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for found in result["settings"]:
        medians = found["medians"]
        pace = [number(medians.get(arm), "clients_per_second") for arm in ("none", "pfl")]
        memory = [number(medians.get(arm), "peak_memory_mib") for arm in ("none", "pfl")]
        ratio = ranged(found.get("ratio_to_pfl", {}).get("clients_per_second"))
        cells = [
            found["model"], f"{found['users']:,}", str(found["workers"]), *pace, ratio,
            ", ".join(memory), ranged(found.get("private_over_not")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for model, found in result.get("agreement", {}).items():
        lines.append(f"{model} without chance: ours {found['ours']:.6f}, pfl {found['pfl']:.6f}")
    return "\n".join(lines)


def number(figures: Figures | None, key: str) -> str:
    return "–" if figures is None else f"{figures[key]:.0f}"


def ranged(values: Figures | None) -> str:
    if values is None:
        return "–"
    return f"{values['median']:.2f} ({values['min']:.2f} to {values['max']:.2f})"
