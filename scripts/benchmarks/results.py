"""The benchmark's figures, their tables, and whether the machine was quiet enough to compare them.

Contestants take turns. So run i of one and run i of another are neighbours in time, and a machine that slows down
affects both. A product of matrices is measured around all runs, too. It is always the same work, so its rate shows how
much the machine itself varied.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from statistics import median, quantiles

ENOUGH_RUNS = 9
TOO_NOISY = 0.2  # the fastest product is 20 % faster than the slowest
HIGHER_IS_BETTER = re.compile("a second|TFLOP/s|share")
FEW_STEPS = "512x512 picture in "  # and the precision


class Results:
    """All figures, by measure and contestant, in the order of their runs."""

    def __init__(self, titles: dict[str, str], product: Callable[[], float]):
        """`titles` are the measures as the tables call them; `product` measures the rate of a product of matrices."""
        self.titles, self.product = titles, product
        self.figures: dict[str, dict[str, list[float]]] = {}
        self.products: dict[str, list[float]] = {}
        self.not_measured: list[str] = []

    def add(self, measure: str, contestant: str, figure: float) -> None:
        self.figures.setdefault(measure, {}).setdefault(contestant, []).append(figure)
        print(f"{measure:10} {contestant:24} {figure:10.3f}", file=sys.stderr)

    def probe(self, *measures: str) -> None:
        """Measures the product of matrices once, for these measures: call it before, between and after their runs."""
        rate = self.product()
        for measure in measures:
            self.products.setdefault(measure, []).append(rate)

    def variation(self, measure: str) -> float:
        """How much faster the fastest product of a measure was than the slowest: 0.2 is 20 %. Without products, 0."""
        rates = self.products.get(measure, [1])
        return max(rates) / min(rates) - 1

    def table(self) -> str:
        """A Markdown table of the figures. Half of the runs are between the quartiles."""
        lines = ["| what | who | median | fastest | quartiles | runs |", "|---|---|---:|---:|---:|---:|"]
        for measure, row in self.figures.items():
            for who, figures in row.items():
                columns = (f"{median(figures):.3g}", f"{self._best(measure, figures):.3g}", quartiles(figures, ".3g"))
                lines.append(f"| {self._title(measure)} | {who} | {' | '.join(columns)} | {len(figures)} |")
        return "\n".join(lines)

    def ratios(self) -> str:
        """A Markdown table of the ratios, or why there are none. The quartiles are those of the single turns."""
        lines = [
            "| what | who | divided by | medians | fastest | quartiles | runs |",
            "|---|---|---|---:|---:|---:|---:|",
        ]
        for measure, row in self.figures.items():
            if measure not in self.products and "memory" not in measure:
                continue  # computed from other measures
            for who, other in pairs(measure, list(row)):
                one, two = row[who], row[other]
                columns = ["too noisy to judge", f"products varied by {100 * self.variation(measure):.0f} %", ""]
                if self.variation(measure) <= TOO_NOISY:
                    ratios = (median(one) / median(two), self._best(measure, one) / self._best(measure, two))
                    turns = [a / b for a, b in zip(one, two)]
                    columns = [*(f"{ratio:.2f}" for ratio in ratios), quartiles(turns, ".2f")]
                runs = min(len(one), len(two))
                lines.append(f"| {self._title(measure)} | {who} | {other} | {' | '.join(columns)} | {runs} |")
        if len(lines) == 2:
            return ""
        return "\n".join([*lines, "", f"A ratio of fewer than {ENOUGH_RUNS} runs is a first impression."])

    def report(self) -> str:
        """Both tables, and one line for everything that was not measured."""
        return "\n\n".join(part for part in (self.table(), self.ratios(), "\n".join(self.not_measured)) if part)

    def _title(self, measure: str) -> str:
        return self.titles.get(measure, measure)

    def _best(self, measure: str, figures: list[float]) -> float:
        return max(figures) if HIGHER_IS_BETTER.search(self._title(measure)) else min(figures)


def pairs(measure: str, contestants: list[str]) -> list[tuple[str, str]]:
    """What is divided by what. Ways of few steps: each by the first one. Otherwise this project by the others in the
    same precision, and by diffusers in float32, which is its default."""
    if measure.startswith(FEW_STEPS):
        return [(who, contestants[0]) for who in contestants[1:]]
    ours = [who for who in contestants if who.startswith("sd ")]
    return [
        (who, other)
        for who in ours
        for other in contestants
        if other not in ours and (other.partition(" ")[2] == who.removeprefix("sd ") or other == "diffusers fp32")
    ]


def quartiles(figures: list[float], form: str) -> str:
    """As in 1.9 to 2.2, or nothing for a single figure."""
    if len(figures) < 2:
        return ""
    low, _, high = quantiles(figures, n=4, method="inclusive")
    return f"{low:{form}} to {high:{form}}"
