"""How near two models' next words are, token by token, on words that one of them said."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field

from lora_gguf.merging.loss import BAD_LOSS, GOOD_LOSS

LEAST = 1e-6  # of a probability that is told only by what it leaves
TIE = 0.2  # nats between two tokens that are as likely: a fifth
SURE = 100  # tokens, below which the figures are rough
LITTLE = 0.005  # a divergence between base and adapter below which the prompts show nothing


def divergence(reference: Mapping[int, float], other: Mapping[int, float]) -> float:
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


def likeliest(logprobs: Mapping[int, float]) -> int:
    """Return the token that is held likeliest."""
    return max(logprobs, key=lambda token: logprobs[token])


@dataclass
class Closeness:
    """Sums over tokens: how many there are, at how many the likeliest one is the same, the divergence, and at how many
    it is another one that the reference holds as likely.
    """

    n_tokens: int = 0
    n_same: int = 0
    total: float = 0.0
    n_tied: int = 0

    def add(self, reference: Mapping[int, float], other: Mapping[int, float]) -> None:
        best, chosen = likeliest(reference), likeliest(other)
        self.n_tokens += 1
        self.n_same += best == chosen
        self.n_tied += best != chosen and reference.get(chosen, -math.inf) > reference[best] - TIE
        self.total += divergence(reference, other)

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

    def as_dict(self) -> dict:
        return {"agreement": self.agreement, "same": self.same, "kl": self.kl}


def summed(parts: Iterable[Closeness]) -> Closeness:
    whole = Closeness()
    for part in parts:
        whole = Closeness(*map(sum, zip(astuple(whole), astuple(part), strict=True)))
    return whole


@dataclass
class Spoken:
    """One prompt: the answers of ``base``, ``adapter`` (the base with it at run time) and ``merged``, and how near base
    and merged file are to the adapter on its own words.
    """

    prompt: str
    answers: dict[str, str] = field(default_factory=dict)
    base: Closeness = field(default_factory=Closeness)
    merged: Closeness = field(default_factory=Closeness)

    def as_dict(self) -> dict:
        said = {"prompt": self.prompt, "n_tokens": self.merged.n_tokens, "answers": self.answers}
        return said | {"base": self.base.as_dict(), "merged": self.merged.as_dict()}


@dataclass
class CompareReport:
    """What llama.cpp said with base, adapter and merged file; ``ok`` unless the merged file does not do as the adapter.

    ``lost`` is the share of the adapter's effect that the merged file lacks: its divergence from the adapter over the
    base's.
    """

    base_name: str
    merged_name: str
    spoken: list[Spoken] = field(default_factory=list)

    @property
    def base(self) -> Closeness:
        return summed(part.base for part in self.spoken)

    @property
    def merged(self) -> Closeness:
        return summed(part.merged for part in self.spoken)

    @property
    def lost(self) -> float:
        return self.merged.kl / max(self.base.kl, LITTLE)

    @property
    def ok(self) -> bool:
        return self.lost < BAD_LOSS

    @property
    def judgement(self) -> str:
        """Whether the merged file does as the adapter: ``yes``, ``partly`` or ``no``; empty where nothing shows it."""
        if not self.ok:
            return "no"
        if not self.merged.n_tokens or self.base.kl < LITTLE:
            return ""
        return "partly" if self.lost > GOOD_LOSS else "yes"

    @property
    def verdict(self) -> str:
        """The judgement in one sentence."""
        n_tokens = self.merged.n_tokens
        if not n_tokens:
            return "the adapter answers these prompts with nothing, so nothing was compared: give others with --prompt"
        found = f"{self.judgement}: {self._found()}" if self.judgement else self._found()
        return f"{found} (of {n_tokens} tokens only: give more prompts to be sure)" if n_tokens < SURE else found

    def _found(self) -> str:
        name, lost = self.merged_name, self.lost
        share, others = self.merged.agreement, self.base.agreement
        same = f"the same next token, or one as likely, {share:.0%} of the time (the base: {others:.0%})"
        if self.judgement == "no":
            nearer = "as the base does, not" if lost < 1.05 else "neither as the base does nor"
            return f"{name} answers {nearer} as the adapter at run time: {same}"
        if self.judgement == "partly":
            return (
                f"{name} has lost {lost:.0%} of the adapter's effect, with {same}: --type Q8_0 or --max-growth 5% keep "
                "more"
            )
        if self.judgement == "yes":
            return f"{name} answers as the adapter at run time: {same}, {lost:.1%} of its effect lost"
        return (
            f"{name} answers as the adapter at run time, but so does the base: give prompts of the kind that the "
            "adapter was trained on"
        )

    def as_dict(self) -> dict:
        """Return the report as plain data for JSON; divergences are in nats."""
        return {
            "ok": self.ok,
            "judgement": self.judgement,
            "verdict": self.verdict,
            "n_tokens": self.merged.n_tokens,
            "lost": self.lost,
            "base": self.base.as_dict(),
            "merged": self.merged.as_dict(),
            "prompts": [part.as_dict() for part in self.spoken],
        }
