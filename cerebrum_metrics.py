"""Metrics for Prometheus: counters by model, histograms, and the text in which they are told (version 0.0.4).

    >>> metrics = Metrics()
    >>> metrics.counter("tokens_total", "Tokens that were relayed.", {"qwen": 42}, "model")
    >>> print(metrics.encode().decode(), end="")
    # HELP tokens_total Tokens that were relayed.
    # TYPE tokens_total counter
    tokens_total{model="qwen"} 42

Strategy
- A daemon counts in a `Tally` of each model and in fields that it has anyway. `/v1/stats` reads the same ones, and a
  scrape only writes them down.
- The values of labels are bounded by tables: paths of routes, ids of models and backends, codes.
- Units are seconds, bytes and ratios. Names end as Prometheus asks: `_total`, `_seconds`, `_bytes`.

The format is https://prometheus.io/docs/instrumenting/exposition_formats/. Pure but for `add_process`, which reads
/proc/self. Standard library only.
"""

from __future__ import annotations

import math
import os
import time
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Upper bounds in seconds. A small model answers from its cache in 50 ms; a 7B loads in 30 s and reads 4,000 tokens in
# 100 s. The longer its bounds, the more lines a scrape has, for each model.
FIRST_TOKEN_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
# With drafts the 0.5B needs a few milliseconds for a token, a 7B on two slow cores a second.
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)

# ---------------------------------------------------------------------------------------------- counting


class Histogram:
    """How many values were at most each of the bounds, and their sum.

    >>> histogram = Histogram((0.5, 1.0))
    >>> for value in (0.5, 0.6, 7.0): histogram.observe(value)
    >>> histogram.cumulative()
    [(0.5, 1), (1.0, 2), (inf, 3)]
    """

    __slots__ = ("_counts", "bounds", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.sum = bounds, 0.0
        self._counts = [0] * (len(bounds) + 1)  # of each interval; the last one has no upper bound

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[float, int]]:
        """(bound, number of values up to it), up to infinity."""
        total, pairs = 0, list[tuple[float, int]]()
        for bound, count in zip((*self.bounds, math.inf), self._counts[:], strict=True):
            total += count
            pairs.append((bound, total))
        return pairs


CANCELLED = "CANCELLED"  # how a completion ends that nobody waits for any more


@dataclass(slots=True)
class Tally:
    """Totals of one model's completions. One thread writes, others may read."""

    prompt_tokens: int = 0  # that were computed
    cached_tokens: int = 0  # of prompts, that were not
    tokens: int = 0  # of answers
    draft_tokens: int = 0  # that drafts proposed
    accepted_tokens: int = 0  # of these, that were right
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_SECONDS))  # seconds to it
    per_token: Histogram = field(default_factory=lambda: Histogram(TOKEN_SECONDS))  # mean of a completion, without it
    ended: dict[str, int] = field(default_factory=dict)  # completions, by finish reason or error code

    def end(self, reason: str) -> None:
        self.ended[reason] = self.ended.get(reason, 0) + 1

    def spoke(self, first: float, last: float, tokens: int) -> None:
        """A completion's first token came after `first` seconds, and the last of `tokens` after `last`."""
        self.first_token.observe(first)
        if tokens > 1:
            self.per_token.observe((last - first) / (tokens - 1))


# ----------------------------------------------------------------------------------------------- writing

Value = float | Histogram
Values = Value | Mapping[Any, Value]  # by the value of the label, or by a tuple of the values of the labels


class Metrics:
    """Families of metrics in the order of adding them. A family without any sample is left out."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def counter(self, name: str, about: str, values: Values, *labels: str) -> None:
        self._add("counter", name, about, values, labels)

    def gauge(self, name: str, about: str, values: Values, *labels: str) -> None:
        self._add("gauge", name, about, values, labels)

    def histogram(self, name: str, about: str, values: Values, *labels: str) -> None:
        self._add("histogram", name, about, values, labels)

    def _add(self, kind: str, name: str, about: str, values: Values, labels: tuple[str, ...]) -> None:
        samples: Mapping[Any, Value] = values if isinstance(values, Mapping) else {(): values}
        if samples:
            self._lines += [f"# HELP {name} {escape_help(about)}", f"# TYPE {name} {kind}"]
        for key, value in samples.items():
            pairs = list(zip(labels, (key,) if isinstance(key, str) else key, strict=True))
            if not isinstance(value, Histogram):
                self._sample(name, pairs, value)
                continue
            buckets = value.cumulative()
            for bound, count in buckets:
                self._sample(f"{name}_bucket", [*pairs, ("le", format_number(bound))], count)
            self._sample(f"{name}_sum", pairs, value.sum)
            self._sample(f"{name}_count", pairs, buckets[-1][1])

    def _sample(self, name: str, pairs: list[tuple[str, str]], value: float) -> None:
        labels = ",".join(f'{label}="{escape_label(text)}"' for label, text in pairs)
        self._lines.append(f"{name}{{{labels}}} {format_number(value)}" if labels else f"{name} {format_number(value)}")

    def encode(self) -> bytes:
        return "".join(f"{line}\n" for line in self._lines).encode()


def escape_label(text: str) -> str:
    r"""The value of a label for use between quotes.

    >>> print(escape_label('say "a\\b"'))
    say \"a\\b\"
    """
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def escape_help(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def format_number(value: float) -> str:
    """As Go's ParseFloat reads it. All digits that a float has are written, so a sum never goes back.

    >>> [format_number(value) for value in (3, 0.1, 1e21, True, math.inf, -math.inf, math.nan)]
    ['3', '0.1', '1e+21', '1', '+Inf', '-Inf', 'NaN']
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


# ------------------------------------------------------------------------- families that both daemons have


def add_build(metrics: Metrics, daemon: str, version: str) -> None:
    metrics.gauge("cerebrum_build_info", "Which daemon this is; always 1.", {(daemon, version): 1}, "daemon", "version")


def add_requests(metrics: Metrics, answered: Mapping[tuple[str, int], int]) -> None:
    """HTTP requests by the path of their route and their status."""
    metrics.counter(
        "cerebrum_http_requests_total",
        "Requests that were answered, by the path of their route and their status as the log has it: 499 for a client"
        " that left, and for an error in a stream that of the error.",
        {(path, str(code)): count for (path, code), count in sorted(answered.items())},
        "path",
        "code",
    )


def add_speed(metrics: Metrics, tallies: Mapping[str, Tally], since: str) -> None:
    """How completions ended and how fast they came, by model. `since`: when the time to the first token begins."""
    metrics.counter(
        "cerebrum_completions_ended_total",
        f"Completions that were computed, by how they ended: a finish reason, the code of an error, or {CANCELLED}.",
        {
            (model, reason): count
            for model, tally in tallies.items()
            for reason, count in sorted(tally.ended.copy().items())
        },
        "model",
        "reason",
    )
    metrics.histogram(
        "cerebrum_time_to_first_token_seconds",
        f"Time from {since} to the first token of a completion.",
        {model: tally.first_token for model, tally in tallies.items()},
        "model",
    )
    metrics.histogram(
        "cerebrum_time_per_token_seconds",
        "Mean time of each further token of a completion.",
        {model: tally.per_token for model, tally in tallies.items()},
        "model",
    )


# ------------------------------------------------------------------------------------- IO: this process


def add_process(metrics: Metrics) -> None:
    """What the kernel knows of this process, under the names of other people's libraries; nothing without /proc."""
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()  # from the third field of proc_pid_stat(5) on
        files = len(os.listdir("/proc/self/fd")) - 1  # one of them is this listing
    except OSError:
        return
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    # Both clocks run alike but for steps of the time, so the difference stays as it is until somebody sets the clock.
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    for kind, name, about, value in (
        (metrics.counter, "cpu_seconds_total", "CPU time of the process.", (int(fields[11]) + int(fields[12])) / ticks),
        (metrics.gauge, "resident_memory_bytes", "Resident memory of the process.", int(fields[21]) * page),
        (metrics.gauge, "virtual_memory_bytes", "Virtual memory of the process.", int(fields[20])),
        (
            metrics.gauge,
            "start_time_seconds",
            "Start of the process since the Unix epoch.",
            round(boot + int(fields[19]) / ticks, 1),
        ),
        (metrics.gauge, "open_fds", "Open files of the process.", files),
        (metrics.gauge, "max_fds", "Most files that the process may open.", os.sysconf("SC_OPEN_MAX")),
    ):
        kind(f"process_{name}", about, value)
