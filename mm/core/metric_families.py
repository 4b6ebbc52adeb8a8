"""Metrics as values: families of samples, and the text that Prometheus reads (format 0.0.4).

Owns the text, which is the Java mesh's to the letter (around 19.3): labels end with a comma, and
numbers look as Java writes them, because ``le="2000.0"`` is another series than ``le="2000"``. What
is shown is ``mm.edge``'s affair.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Final, Literal

from mm.core.histograms import Bounds, Histogram

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """A number, or a whole histogram, under its labels."""

    value: float | Histogram
    labels: Labels = ()


@dataclass(frozen=True, slots=True)
class Family:
    """All samples of one name."""

    name: str
    kind: Kind
    help: str
    samples: tuple[Sample, ...]


def write_text(families: Iterable[Family], names: Collection[str] = ()) -> bytes:
    """Answer the exposition; with ``names``, only of these families or single series."""
    lines: list[str] = []
    for family in families:
        written = [
            line
            for series, line in _lines(family)
            if not names or family.name in names or series in names
        ]
        if written:
            lines.append(f"# HELP {family.name} {_escaped(family.help, quotes=False)}")
            lines.append(f"# TYPE {family.name} {family.kind}")
            lines += written
    lines.append("")
    return "\n".join(lines).encode()


def _lines(family: Family) -> Iterator[tuple[str, str]]:
    """Answer the lines of a family, each after the name of its series."""
    name = family.name
    for sample in family.samples:
        labels = "".join(f'{label}="{_escaped(text)}",' for label, text in sample.labels)
        if not isinstance(sample.value, Histogram):
            yield name, f"{name}{_braced(labels)} {java_number(sample.value)}"
            continue
        histogram, count = sample.value, 0
        bucket = f"{name}_bucket"
        for bound, own in zip(_bound_texts(histogram.bounds), histogram.counts, strict=True):
            count += own
            yield bucket, f'{bucket}{{{labels}le="{bound}",}} {java_number(count)}'
        yield f"{name}_count", f"{name}_count{_braced(labels)} {java_number(count)}"
        yield f"{name}_sum", f"{name}_sum{_braced(labels)} {java_number(histogram.total)}"


def _braced(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _escaped(text: str, *, quotes: bool = True) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


@lru_cache
def _bound_texts(bounds: Bounds) -> tuple[str, ...]:
    return (*map(java_number, bounds), "+Inf")


def java_number(value: float) -> str:
    """Answer a number as Java's ``Double.toString`` writes it, infinity as Prometheus wants it."""
    value = float(value)
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if math.isnan(value):
        return "NaN"
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        return repr(value)
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int)
    rest = "".join(map(str, digits[1:])) or "0"
    return f"{'-' if sign else ''}{digits[0]}.{rest}E{len(digits) - 1 + exponent}"
