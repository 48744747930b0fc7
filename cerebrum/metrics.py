"""Counts of completions, and the table of counters behind `/metrics` and `/v1/stats` of both
daemons.

    >>> row = Metric("tokens_total", "Tokens of completions.", "tokens", "tokens")
    >>> tallies = {"qwen": Tally(tokens=40), "llama": Tally(tokens=2)}
    >>> table = [("model", tallies, [row])]
    >>> print(write_metrics(table).decode(), end="")
    # HELP tokens_total Tokens of completions.
    # TYPE tokens_total counter
    tokens_total{model="qwen"} 40
    tokens_total{model="llama"} 2
    >>> write_stats(table)
    {'tokens': 42}

A daemon counts in a `Tally` for each model and in its own fields. Its table has one row for each
number, so `/metrics` and `/v1/stats` cannot disagree. Metrics are in seconds, bytes and ratios.
Label values come from fixed sets (paths of routes, codes, ids of models and backends) and contain
nothing that must be escaped. The text is Prometheus's format 0.0.4, see
https://prometheus.io/docs/instrumenting/exposition_formats/. Standard library only.
"""

from __future__ import annotations

import math
import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

from cerebrum_common import Request, Response

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STARTED = time.monotonic()
# Upper bounds in seconds. A small model answers from its cache in 50 ms; a 7B loads in 30 s and
# reads 4,000 tokens in 100 s. Each further bound adds a line per model to a scrape.
FIRST_TOKEN_SECONDS = (
    0.05, 0.1, 0.2, 0.3, 0.5, 0.75,
    1.0, 1.5, 2.0, 3.0, 5.0,
    10.0, 20.0, 30.0, 60.0, 120.0,
)  # fmt: skip
# With drafts the 0.5B takes a few milliseconds per token; a 7B on two slow cores takes a second.
TOKEN_SECONDS = (
    0.002, 0.005,
    0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075,
    0.1, 0.15, 0.2, 0.3, 0.5,
    1.0, 2.0,
)  # fmt: skip


# ----------------------------------------------------------------------------------------- counting


class Histogram:
    """Number of values up to each bound, and the sum of all values.

    >>> histogram = Histogram((0.5, 1.0))
    >>> for value in (0.5, 0.6, 7.0): histogram.observe(value)
    >>> print(*histogram.lines("x", '{model="m"}'), sep="", end="")
    x_bucket{model="m",le="0.5"} 1
    x_bucket{model="m",le="1"} 2
    x_bucket{model="m",le="+Inf"} 3
    x_sum{model="m"} 8.1
    x_count{model="m"} 3
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = (*bounds, math.inf)  # the last interval has no other bound
        self.sum = 0.0
        self._counts = [0] * len(self.bounds)  # per interval up to a bound

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """The samples of a metric with these labels."""
        count = 0
        for bound, number in zip(self.bounds, self._counts, strict=True):
            count += number
            text = "+Inf" if bound == math.inf else f"{bound:g}"
            yield f'{name}_bucket{labels[:-1]},le="{text}"}} {count}\n'
        yield f"{name}_sum{labels} {self.sum}\n"
        yield f"{name}_count{labels} {count}\n"


CANCELLED = "CANCELLED"  # the end of a completion that nobody waits for any more


@dataclass(slots=True)
class Tally:
    """Totals of one model's completions. One thread writes, others may read."""

    prompt_tokens: int = 0  # of prompts, computed
    cached_tokens: int = 0  # of prompts, found in a cache
    tokens: int = 0  # of answers
    draft_tokens: int = 0  # proposed by drafts
    accepted_tokens: int = 0  # draft tokens that were right
    # Seconds: to the first token, and the mean of each further one.
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_SECONDS))
    per_token: Histogram = field(default_factory=lambda: Histogram(TOKEN_SECONDS))
    # Completions, by finish reason or error code.
    ended: Counter[str] = field(default_factory=Counter)

    def spoke(self, first: float, last: float, tokens: int) -> None:
        """Record a completion whose first token came after `first` seconds, and the last of
        `tokens` after `last`.
        """
        self.first_token.observe(first)
        if tokens > 1:
            self.per_token.observe((last - first) / (tokens - 1))


# ------------------------------------------------------------------------------------------- tables


class Metric(NamedTuple):
    """A row: a metric, and the member of /v1/stats with the same number.

    `read` is a function of the row's subject, such as a Tally, or the name of the subject's
    attribute. The result is a number, a Histogram, or numbers by further labels, such as
    `reason="stop"`. A number is a counter if `name` ends in `_total`, else a gauge.
    """

    name: str
    about: str
    read: str | Callable[[Any], Any]
    stats: str = ""  # the member's name; the member is the sum over all labels
    # Of the member, such as 2**20 for MiB of bytes; a member with a unit is rounded to a tenth.
    unit: float = 0

    def samples(self, label: str, subjects: Mapping[str, Any]) -> dict[str, Any]:
        """The numbers or Histograms by their labels, such as `{model="qwen"}`. The subjects are
        given by the value of `label`.
        """
        read = attrgetter(self.read) if isinstance(self.read, str) else self.read
        samples = {}
        for key, subject in subjects.items():
            own = f'{label}="{key}"' if label else ""
            found = read(subject)
            if not isinstance(found, Mapping):
                found = {"": found}
            for more, number in found.items():
                text = ",".join(filter(None, (own, more)))
                samples[f"{{{text}}}" if text else ""] = number
        return samples

    def lines(self, samples: Mapping[str, Any]) -> Iterator[str]:
        """Its part of /metrics. All digits of a float are written, so a sum never decreases."""
        kind = "counter" if self.name.endswith("_total") else "gauge"
        lines = list[str]()
        for labels, number in samples.items():
            if isinstance(number, Histogram):
                kind = "histogram"
                lines += number.lines(self.name, labels)
            else:
                lines.append(f"{self.name}{labels} {+number}\n")
        if lines:
            yield f"# HELP {self.name} {self.about}\n"
            yield f"# TYPE {self.name} {kind}\n"
        yield from lines


# Groups of rows: the label of their subjects ("": there is a single one), the subjects by the
# label's value, and the rows.
Table = Iterable[tuple[str, Mapping[str, Any], Sequence[Metric]]]


def write_metrics(table: Table) -> bytes:
    """The body of /metrics."""
    lines = list[str]()
    for label, subjects, rows in table:
        for row in rows:
            lines += row.lines(row.samples(label, subjects))
    return "".join(lines).encode()


def metrics_of(request: Request, table: Table) -> Response:
    """The response of /metrics, with the rows of SERVER."""
    server = ("", {"": request.answered}, SERVER)
    return Response(write_metrics([server, *table]), kind=CONTENT_TYPE)


def write_stats(table: Table) -> dict[str, Any]:
    """The table's members of /v1/stats."""
    members = {}
    for label, subjects, rows in table:
        for row in rows:
            if row.stats:
                total = sum(row.samples(label, subjects).values())
                members[row.stats] = round(total / row.unit, 1) if row.unit else total
    return members


# ---------------------------------------------------------------------- rows that both daemons have

COMPLETIONS = (  # read from a Tally
    Metric(
        "cerebrum_completions_ended_total",
        "Completions by finish reason, error code, or CANCELLED.",
        lambda tally: {f'reason="{end}"': count for end, count in tally.ended.copy().items()},
    ),
    Metric(
        "cerebrum_time_to_first_token_seconds",
        "Time to the first token: on the Pi from the request, on the VPS from the start with a "
        "loaded model.",
        "first_token",
    ),
    Metric(
        "cerebrum_time_per_token_seconds",
        "Mean time of each further token of a completion.",
        "per_token",
    ),
)
# Read from `Server.answered`; process metrics have the names that other client libraries use.
SERVER = (
    Metric(
        "cerebrum_http_requests_total",
        "Requests by path of their route and status in the log, such as 499.",
        lambda answered: {
            f'path="{path}",code="{status}"': count for (path, status), count in answered.items()
        },
    ),
    Metric(
        "process_cpu_seconds_total",
        "CPU time of the process.",
        lambda _: time.process_time(),
    ),
    Metric(
        "process_resident_memory_bytes",
        "Resident memory of the process.",
        lambda _: resident_bytes(),
    ),
    Metric(
        "process_start_time_seconds",
        "Start of the process, by the clock as it is now.",
        lambda _: round(time.time() - time.monotonic() + STARTED, 1),
    ),
)


def resident_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
