"""`mm sim`: the options and what is printed; what happens is ``mm.testing.simulator``'s affair."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from mm.cli.errors import CommandError

if TYPE_CHECKING:
    from mm.testing.simulator import Options, Run

app = typer.Typer(rich_markup_mode=None)


@app.command()
def sim(
    scenario: Annotated[
        str, typer.Argument(help="A scenario that prints figures; none: random faults.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs, each of the next seed.")] = 50,
    first_seed: Annotated[int, typer.Option(min=0, help="The first one.")] = 0,
    instances: Annotated[
        int, typer.Option(min=0, max=100, help="Instances in each run; 0: the seed decides.")
    ] = 0,
    models: Annotated[
        int, typer.Option(min=0, max=10_000, help="Models in each run; 0: the seed decides.")
    ] = 0,
    vmodels: Annotated[
        int, typer.Option(min=0, max=100, help="vmodels that are set and deleted in each run.")
    ] = 0,
    seconds: Annotated[
        float, typer.Option(min=1, help="How long faults go on, in virtual time.")
    ] = 60.0,
) -> None:
    """Prove the mesh in a simulated cluster, or print a scenario's figures.

    A run is a whole cluster in this process, on a clock that jumps: real instances over a store,
    runtimes and a network that fail as the seed decides, while clients call. Then the faults end,
    and everything must come right. The same seed is the same run.

    Exit code 0 if nothing was violated; 1 if something was, with the events that led there and the
    line that replays it, or if a scenario missed a target.

    \b
    Examples:
      mm sim                                50 runs, in about a minute
      mm sim --first-seed 17 --seeds 1      one of them again
      mm sim --seeds 1000 --instances 8
      mm sim cold-burst                     the figures of a scenario
    """
    if importlib.util.find_spec("trio") is None:
        raise CommandError("`mm sim` needs trio: pip install 'mm[sim]'")
    if scenario:
        _print_scenario(scenario, first_seed)
        return
    from mm.testing.simulator import Options

    options = Options(
        instances_count=instances, models_count=models, safety_s=seconds, vmodels_count=vmodels
    )
    _simulate(range(first_seed, first_seed + seeds), options)


def _print_scenario(name: str, seed: int) -> None:
    from mm.testing.scenarios import SCENARIOS

    if name not in SCENARIOS:
        raise CommandError(
            f"there is no scenario {name!r}: it is one of {', '.join(SCENARIOS)}", exit_code=2
        )
    # What instances log is none of the figures; without any handler warnings would be printed.
    logging.getLogger("mm").addHandler(logging.NullHandler())
    report = SCENARIOS[name](seed)
    for line in report.lines():
        typer.echo(line)
    if not report.is_met:
        raise typer.Exit(1)


def _simulate(seeds: range, options: Options) -> None:
    from mm.testing.simulator import simulate

    total: Counter[str] = Counter()
    failed: list[int] = []
    for seed in seeds:
        run = simulate(seed, options)
        if run.failure is not None:
            failed.append(seed)
            _clear_progress()
            for line in lines_of_failure(run):
                typer.echo(line)
        total.update(runs=1, faults=run.faults_count, loads=run.loads_count)
        total.update(calls=sum(run.answers.values()), served=run.answers.get("SERVED", 0))
        _show_progress(
            f"{total['runs']} of {len(seeds)} runs, {len(failed)} failed:"
            f" {total['faults']} faults, {total['calls']} calls ({total['served']} served),"
            f" {total['loads']} loads",
            is_last=seed == seeds[-1],
        )
    if failed:
        typer.echo(f"failed seeds: {', '.join(map(str, failed))}")
        raise typer.Exit(1)


def lines_of_failure(run: Run) -> list[str]:
    """Answer what to print of a run that failed; the last line replays it."""
    failure = run.failure
    assert failure is not None
    lines = [f"seed {run.seed} failed after {run.events_count} events", failure.text]
    lines += failure.traceback.splitlines()
    lines += ["what happened before:", *map(str, failure.story)]
    return [*lines, f"again: {run.replay}", ""]


def _show_progress(text: str, *, is_last: bool) -> None:
    """One line that changes on a terminal, else one at the end."""
    if sys.stdout.isatty():
        typer.echo(f"\r\x1b[K{text}", nl=is_last)
    elif is_last:
        typer.echo(text)


def _clear_progress() -> None:
    if sys.stdout.isatty():
        typer.echo("\r\x1b[K", nl=False)
