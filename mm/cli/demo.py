"""`mm demo`: the options; what happens is ``mm.demo``'s affair."""

from __future__ import annotations

import sys
from typing import Annotated, Final

import typer

from mm.demo.limits import EVICTIONS_MIN, INSTANCES_MIN, MODELS_PER_INSTANCE_MIN

app = typer.Typer(rich_markup_mode=None)

_MODELS_HELP: Final = f"Models to train: at least {MODELS_PER_INSTANCE_MIN} for each instance."


@app.command()
def demo(
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Leave everything up at the end, and print calls to paste."),
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=1, max=86_400, help="How long to send traffic.")
    ] = 30.0,
    models: Annotated[int, typer.Option(min=1, max=500, help=_MODELS_HELP)] = 60,
    instances: Annotated[
        int, typer.Option(min=INSTANCES_MIN, max=20, help="Instances to start; see --models.")
    ] = 3,
    seed: Annotated[
        int, typer.Option(min=0, help="Decides on models, traffic and the instance to kill.")
    ] = 1,
    plain: Annotated[
        bool, typer.Option("--plain", help="Print lines, even on a terminal.")
    ] = False,
    # For tests, which have less time than it takes.
    evictions: Annotated[int, typer.Option(hidden=True)] = EVICTIONS_MIN,
) -> None:
    """See it work: several instances, more real models than they hold, checked answers.

    Starts an etcd and three `mm serve` processes, each with a scikit-learn runtime, on free ports
    of this machine; trains and registers 60 models, of which all instances together hold about a
    quarter; sends calls to all instances and compares every answer with what scikit-learn itself
    says. Half-way it kills one instance and starts it again. Takes about a
    minute, half of it traffic.

    Exit code 0 if every answer was right and no call failed except those in flight on the killed
    instance; 1 if not, with the reasons and the place of the logs; 130 after Ctrl-C, which takes
    everything down.

    \b
    Examples:
      mm demo
      mm demo --keep                 leave it up to play with
      mm demo --seconds 300 --seed 7 --plain
    """
    import anyio
    from rich.console import Console

    from mm.cli.errors import MISUSED, CommandError
    from mm.demo.run import Options, run_demo

    needed, fitting = instances * MODELS_PER_INSTANCE_MIN, models // MODELS_PER_INSTANCE_MIN
    if models < needed:
        fewer = f", or --instances {fitting} or fewer" if fitting >= INSTANCES_MIN else ""
        raise CommandError(
            f"{models} models are too few for {instances} instances: at least"
            f" {MODELS_PER_INSTANCE_MIN} for each are needed, or all fit and none is evicted; give"
            f" --models {needed} or more{fewer}",
            exit_code=MISUSED,
        )
    options = Options(
        traffic_s=seconds,
        model_count=models,
        instance_count=instances,
        seed=seed,
        is_plain=plain or not sys.stdout.isatty(),
        keeps_running=keep,
        evictions_min=evictions,
    )
    uvloop = {"use_uvloop": True}
    raise typer.Exit(anyio.run(run_demo, options, Console(), backend_options=uvloop))
