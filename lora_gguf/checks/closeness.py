"""How near two models' next words are, token by token, on words that one of them said."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass

LEAST = 1e-6  # of a probability that is told only by what it leaves
TIE = 0.2  # nats between two tokens that are as likely: as far apart as two right computations put them

Logprobs = Mapping[int, float]


def divergence(reference: Logprobs, other: Logprobs) -> float:
    """Return the KL divergence of ``other`` from ``reference`` in nats, as far as the likeliest tokens, whose
    log-probabilities they are, tell: the true one is no smaller.

    It is the larger of two such bounds: the tokens that both list, with all others as one; and those that ``reference``
    lists, each that ``other`` does not at most as likely there as its last one.
    """
    common = {token: (p, other[token]) for token, p in reference.items() if token in other}
    least = min(other.values())
    listed = {token: (p, other.get(token, least)) for token, p in reference.items()}
    q_listed = sum(math.exp(q) for _, q in common.values())
    return max(0.0, *(_coarse(list(pairs.values()), q_listed) for pairs in (common, listed)))


def _coarse(pairs: Sequence[tuple[float, float]], q_listed: float) -> float:
    """The sum over pairs of log-probabilities, and over what is left of both."""
    p_rest = max(LEAST, 1 - sum(math.exp(p) for p, _ in pairs))
    q_rest = max(LEAST, 1 - q_listed)
    return sum(math.exp(p) * (p - q) for p, q in pairs) + p_rest * math.log(p_rest / q_rest)


def likeliest(logprobs: Logprobs) -> int:
    """Return the token that is held likeliest."""
    return max(logprobs, key=lambda token: logprobs[token])


def centred_product(reference: Logprobs, one: Logprobs, two: Logprobs) -> tuple[float, float, float]:
    """Return the products one·one, one·two and two·two of changes of log-probabilities: their covariances over the
    tokens that all three hold, each as often as ``reference`` says it.
    """
    weighed = [(math.exp(p), one[token], two[token]) for token, p in reference.items() if token in one and token in two]
    total = sum(p for p, _, _ in weighed)
    if not total:
        return 0.0, 0.0, 0.0
    means = [sum(p * pair[k] for p, *pair in weighed) / total for k in (0, 1)]
    apart = [(p / total, x - means[0], y - means[1]) for p, x, y in weighed]
    return sum(p * x * x for p, x, _ in apart), sum(p * x * y for p, x, y in apart), sum(p * y * y for p, _, y in apart)


@dataclass
class Closeness:
    """Sums over tokens: how many there are, at how many the likeliest one is the same, the divergence, at how many it
    is another one that the reference holds as likely; and the products of the changes that reference (``wanted``) and
    other (``own``) make to what the plain model says.
    """

    n_tokens: int = 0
    n_same: int = 0
    total: float = 0.0
    n_tied: int = 0
    wanted: float = 0.0
    along: float = 0.0
    own: float = 0.0

    def add(self, reference: Logprobs, other: Logprobs, plain: Logprobs) -> None:
        """Count one token: its log-probabilities by the reference, by the other, and by the plain model."""
        best, chosen = likeliest(reference), likeliest(other)
        self.n_tokens += 1
        self.n_same += best == chosen
        self.n_tied += best != chosen and reference.get(chosen, -math.inf) > reference[best] - TIE
        self.total += divergence(reference, other)
        changes = [
            {token: told[token] - p for token, p in plain.items() if token in told} for told in (reference, other)
        ]
        wanted, along, own = centred_product(reference, *changes)
        self.wanted, self.along, self.own = self.wanted + wanted, self.along + along, self.own + own

    @property
    def same(self) -> float:
        """The share of the tokens at which both hold the same one likeliest."""
        return self.n_same / self.n_tokens if self.n_tokens else math.nan

    @property
    def agreement(self) -> float:
        """The share of the tokens at which they agree: on the likeliest one, or on one that is as likely."""
        return (self.n_same + self.n_tied) / self.n_tokens if self.n_tokens else math.nan

    @property
    def kl(self) -> float:
        return self.total / self.n_tokens if self.n_tokens else math.nan

    @property
    def strength(self) -> float:
        """How strong the reference's changes to the plain model are in the other: 1 as they are, 0 not at all."""
        return self.along / self.wanted if self.wanted else math.nan

    @property
    def likeness(self) -> float:
        """How much alike the two changes are, whatever their strength: the cosine between them."""
        return self.along / math.sqrt(self.wanted * self.own) if self.wanted and self.own else 0.0

    @property
    def astray(self) -> float:
        """How far the other's changes are from the reference's: the energy of the difference over that of these."""
        return 1 - 2 * self.strength + self.own / self.wanted if self.wanted else math.nan

    def as_dict(self) -> dict:
        return {
            "same": self.same,
            "agreement": self.agreement,
            "kl": self.kl,
            "strength": self.strength,
            "astray": self.astray,
        }


def summed(parts: Iterable[Closeness]) -> Closeness:
    """Return the sums over all parts."""
    whole = Closeness()
    for part in parts:
        whole = Closeness(*map(sum, zip(astuple(whole), astuple(part), strict=True)))
    return whole
