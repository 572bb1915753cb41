"""Rounds in which the ways that are compared take turns, so that a busy machine is busy for all of them."""

from collections.abc import Callable, Mapping


def alternate(candidates: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The figure of each candidate in each round; every round begins with another one."""
    names = list(candidates)
    figures: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            figures[name].append(candidates[name]())
    return figures
