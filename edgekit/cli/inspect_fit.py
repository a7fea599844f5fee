"""What `edgekit inspect MODEL --for PROFILE` shows."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from edgekit.artifact import FORMAT_NAMES
from edgekit.cli.console import size, stdout
from edgekit.convert import path_between
from edgekit.fit import Fit, Place, format_name
from edgekit_runtime.engines import ENGINES

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
    if not any(place.engine in ENGINES for place in fit.places):
        stdout.print(
            "judged only: this version makes no bundles for "
            f"{', '.join(profile.engines) or 'a device without engines'}"
        )
    _show_places(fit)
    _show_operators(fit, every=every)
    for place in fit.places:
        _show_reasons(fit, place)
    _show_memory(fit)
    for reason in fit.hopeless:
        stdout.print(f"[bold red]does not fit:[/bold red] {reason}", soft_wrap=True)
    if not fit.hopeless:
        open_ones = [*_not_known(fit)]
        stdout.print(
            "[bold]nothing known speaks against it[/bold]; only running it there proves it"
            + (f". Not known: {'; '.join(open_ones)}" if open_ones else ""),
            soft_wrap=True,
        )


def _not_known(fit: Fit) -> Iterator[str]:
    """What nobody could judge, for the last line to say."""
    if not fit.places:
        yield "where it runs (the profile lists no engine)"
    for place in fit.places:
        states = [verdict.state for verdict in fit.verdicts[place.id]]
        if "unknown" in states:
            yield f"{states.count('unknown')} of {len(states)} operators at {place.id}"
    need = fit.needs[0]
    if need.activations is None:
        yield "activation memory"
    memory = fit.profile.memory
    if fit.profile.kind == "microcontroller":
        missing = [key for key in ("sram_bytes", "flash_bytes") if getattr(memory, key) is None]
    else:
        missing = [] if fit.limits(need) else ["ram_bytes"]
    if missing:
        names = " and ".join(f"memory.{key}" for key in missing)
        yield f"{names} of the device, so nothing was compared with it"


def _show_reasons(fit: Fit, place: Place) -> None:
    """Why operators do not run at a place, or are not known to; whose counterpart is not known is
    one reason for many types."""
    for state, word in (("no", "no"), ("unknown", "?")):
        found = fit.reasons(place, state)  # type: ignore[arg-type]
        if state == "unknown" and len(found) > _FEW:
            count = sum(map(len, found.values()))
            stdout.print(
                f"{place.id}: ?: {count} operators have no counterpart of their own there; what "
                "the conversion makes of them is not known",
                markup=False, soft_wrap=True,
            )  # fmt: skip
            continue
        for reason, paths in found.items():
            more = f" and {len(paths) - _FEW} more" if len(paths) > _FEW else ""
            stdout.print(
                f"{place.id}: {word}: {reason}: {', '.join(paths[:_FEW])}{more}",
                markup=False, soft_wrap=True,
            )  # fmt: skip
    wanted = ENGINES[place.engine].formats if place.engine in ENGINES else ("tflite",)
    if place.kind == "cpu" and fit.graph.format not in wanted:
        path = path_between(fit.graph.format, wanted[0])
        how = f"no way from {FORMAT_NAMES[fit.graph.format]} in this version"
        if path:
            how = f"converted by {', '.join(edge.distributions[0] for edge in path)}, not tried"
        names = FORMAT_NAMES.get(wanted[0], wanted[0])
        stdout.print(f"{place.id}: takes {names} models; {how}", markup=False)


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
        for field, limit, wanted, what in fit.limits(need):
            verdict = "may fit" if wanted is None or wanted <= limit else "does not fit"
            stdout.print(
                f"  {what}: {size(wanted)} of {size(limit)} ({field}): {verdict}", markup=False
            )


def _called(place: Place) -> str:
    return f"{place.id} (CPU)" if place.kind == "cpu" else f"{place.id} ({place.kind})"
