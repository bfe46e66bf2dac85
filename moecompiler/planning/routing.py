"""How many experts a step needs, where every token chooses its experts at random and independently of the others."""

from __future__ import annotations

from functools import cache
from math import comb


@cache
def experts_hit(experts: int, top_k: int, tokens: int) -> tuple[float, ...]:
    """By n, the probability that ``tokens`` tokens, each choosing ``top_k`` of ``experts``, choose n distinct ones."""
    chances = [1.0] + [0.0] * experts
    for _ in range(tokens):
        after = [0.0] * (experts + 1)
        for hit, chance in enumerate(chances):
            for new in range(min(top_k, experts - hit) + 1):
                ways = comb(experts - hit, new) * comb(hit, top_k - new)
                after[hit + new] += chance * ways / comb(experts, top_k)
        chances = after
    return tuple(chances)


@cache
def most_hit(experts: int, top_k: int, tokens: int, ranks: int) -> float:
    """The expected number of distinct experts that the busiest of ``ranks``, among which the experts are dealt, has to read. With
    one rank it is the number of all distinct ones, ``experts · (1 - (1 - top_k / experts) ** tokens)``."""
    local = experts // ranks
    expected = 0.0
    for hit, chance in enumerate(experts_hit(experts, top_k, tokens)):
        # P(most > m) summed over m; sets of ``hit`` experts are all as likely
        within = [_subsets(local, ranks, hit, most) / comb(experts, hit) for most in range(local)]
        expected += chance * sum(1.0 - each for each in within)
    return expected


def _subsets(local: int, ranks: int, size: int, most: int) -> int:
    """In how many ways ``size`` experts can be chosen of ``ranks`` groups of ``local``, at most ``most`` of each."""
    ways = [1] + [0] * size
    for _ in range(ranks):
        ways = [sum(ways[n - j] * comb(local, j) for j in range(min(n, most) + 1)) for n in range(size + 1)]
    return ways[size]
