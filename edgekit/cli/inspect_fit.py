"""What `edgekit inspect MODEL --for PROFILE` shows."""

from __future__ import annotations

from rich.table import Table

from edgekit.cli.console import size, stdout
from edgekit.fit import Fit, Place, format_name

__all__ = ["show_fit"]

_FEW = 3  # operators named beside a reason


def show_fit(fit: Fit, path: str, *, every: bool) -> None:
    """The judgement on screen: by type of operator, or `every` one of them."""
    graph, profile = fit.graph, fit.profile
    macs = f"{graph.macs / 1e6:.4g} M" if graph.macs is not None else "an unknown number of"
    stdout.print(f"[bold]{path}[/bold] on {profile.name} ({profile.id})", soft_wrap=True)
    stdout.print(
        f"{format_name(graph)}, {len(graph.operators)} operators, {macs} multiply-accumulates"
    )
    _show_places(fit)
    _show_operators(fit, every=every)
    for place in fit.places:
        for reason, paths in fit.refusals(place).items():
            more = f" and {len(paths) - _FEW} more" if len(paths) > _FEW else ""
            stdout.print(
                f"{place.id}: no: {reason}: {', '.join(paths[:_FEW])}{more}",
                markup=False, soft_wrap=True,
            )  # fmt: skip
    _show_memory(fit)
    for reason in fit.hopeless:
        stdout.print(f"[bold red]does not fit:[/bold red] {reason}", soft_wrap=True)
    if not fit.hopeless:
        stdout.print("[bold]nothing speaks against it[/bold]; only running it there proves it")


def _show_places(fit: Fit) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("place", "judged by the operators of", "run", "no", "not known", "of the MACs"):
        table.add_column(column, justify="left" if column.startswith(("pl", "ju")) else "right")
    for place in fit.places:
        states = [verdict.state for verdict in fit.verdicts[place.id]]
        share = fit.macs_share(place)
        table.add_row(
            _called(place), place.by, str(states.count("runs")), str(states.count("no")),
            str(states.count("unknown")), "-" if share is None else f"{100 * share:.0f} %",
        )  # fmt: skip
    stdout.print()
    stdout.print(table)


def _show_operators(fit: Fit, *, every: bool) -> None:
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, operator in enumerate(fit.graph.operators):
        words = tuple(str(fit.verdicts[place.id][number]) for place in fit.places)
        groups.setdefault((operator.path if every else operator.type, *words), []).append(number)
    table = Table(box=None, pad_edge=False)
    table.add_column("operator", overflow="fold")
    for column in ("count", "MACs"):
        table.add_column(column, justify="right")
    for place in fit.places:
        table.add_column(place.id, overflow="fold")
    total = fit.graph.macs
    for group, numbers in groups.items():
        name, words = group[0], group[1:]
        counts = [fit.graph.operators[number].macs for number in numbers]
        known = [one for one in counts if one is not None]
        share = f"{100 * sum(known) / total:.0f} %" if total and len(known) == len(counts) else "?"
        table.add_row(name, str(len(numbers)), "" if share == "0 %" else share, *words)
    stdout.print()
    stdout.print(table)
    stdout.print("yes: runs there; if ...: after that was done to the model; ?: not known")
    stdout.print()


def _show_memory(fit: Fit) -> None:
    for need in fit.needs:
        if need.activations is None:
            free = ", ".join(fit.graph.free_dimensions()) or "unknown"
            stdout.print(
                f"memory {need.precision}: weights {size(need.weights)}; activations depend on "
                f"{free}: give --inputs NAME=1x3x224x224",
                markup=False,
            )
            return
        at = f" (at {need.at})" if need.at else ""
        stdout.print(
            f"memory {need.precision}: weights {size(need.weights)}, activations at least "
            f"{size(need.activations)}{at}, estimated",
            markup=False, soft_wrap=True,
        )  # fmt: skip


def _called(place: Place) -> str:
    return f"{place.id} (CPU)" if place.kind == "cpu" else f"{place.id} ({place.kind})"
