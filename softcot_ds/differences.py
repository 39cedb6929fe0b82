"""Who has which value, in words: nodes by name, single ranks where others of their node differ."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar


class Rank(Protocol):
    """Anything that is known of one rank."""

    rank: int
    node: str


R = TypeVar("R", bound=Rank)


def difference(ranks: Sequence[R], value: Callable[[R], Any]) -> str:
    """Who has which value: ``2.13.0 on node1, node2; 2.12.1 on node3``. Empty where all have the same one."""
    groups = by_value(ranks, value)
    most_frequent_first = sorted(groups.items(), key=lambda item: -len(item[1]))
    texts = [f"{value or 'none'} on {name_ranks(some, ranks)}" for value, some in most_frequent_first]
    return enumerate_some(texts, "; ") if len(groups) > 1 else ""


def by_value(ranks: Sequence[R], value: Callable[[R], Any]) -> dict[Any, list[R]]:
    """The ranks by value, in the order in which values first appear."""
    groups: dict[Any, list[R]] = {}
    for facts in ranks:
        groups.setdefault(value(facts), []).append(facts)
    return groups


def name_ranks(some: Sequence[R], ranks: Sequence[R]) -> str:
    """Nodes by name; single ranks where others of ``ranks`` on their node do not belong to ``some``."""
    names: list[str] = []
    for node, members in by_value(some, lambda facts: facts.node).items():
        whole = len(members) == sum(facts.node == node for facts in ranks)
        names += [node] if whole else [f"rank {facts.rank} ({node})" for facts in members]
    return enumerate_some(names)


def enumerate_some(names: Sequence[str], separator: str = ", ", most: int = 6) -> str:
    """The first ``most`` of the names, and how many more there are."""
    more = f"{separator}and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more
