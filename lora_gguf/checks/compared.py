"""What a comparison found: the answers, how near they are to the adapter's, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_gguf.checks.closeness import Closeness, summed
from lora_gguf.merging.loss import BAD_LOSS, GOOD_LOSS

SURE = 100  # tokens, below which the figures are rough
LITTLE = 0.005  # a divergence between base and adapter below which the prompts show nothing
GOOD_STRENGTH, SOME_STRENGTH = 0.15, 0.35  # how far from 1 the effect's strength may be: good, and not yet wrong
UNCHANGED = 0.1  # of the adapter's changes (their energy): a file that changes less answers as the base does
ALIKE = 0.6  # changes at least so much alike are the same ones at another strength


@dataclass
class Spoken:
    """One prompt: the answers of ``base``, ``adapter`` (the base with it at run time) and ``merged``, and how near the
    three are to the adapter on its own words. The adapter itself is asked ``again`` after it read all words at once
    instead of one by one: llama.cpp computes that in another order, so that it differs as two right files may.
    """

    prompt: str
    answers: dict[str, str] = field(default_factory=dict)
    base: Closeness = field(default_factory=Closeness)
    again: Closeness = field(default_factory=Closeness)
    merged: Closeness = field(default_factory=Closeness)

    def as_dict(self) -> dict:
        said = {"prompt": self.prompt, "n_tokens": self.merged.n_tokens, "answers": self.answers}
        return said | {name: getattr(self, name).as_dict() for name in NEAR}


NEAR = ("base", "again", "merged")


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
    def again(self) -> Closeness:
        return summed(part.again for part in self.spoken)

    @property
    def merged(self) -> Closeness:
        return summed(part.merged for part in self.spoken)

    @property
    def lost(self) -> float:
        return self.merged.kl / max(self.base.kl, LITTLE)

    @property
    def shows(self) -> bool:
        """Whether the adapter changes what is said to these prompts, so that anything can be told."""
        return self.merged.n_tokens > 0 and self.base.kl >= LITTLE

    @property
    def judgement(self) -> str:
        """Whether the merged file does as the adapter: ``yes``, ``partly`` or ``no``; empty where nothing shows it."""
        if not self.shows:
            return "no" if self.lost >= BAD_LOSS else ""
        off, unlike = abs(self.merged.strength - 1), max(self.lost, self.merged.astray)
        if off > SOME_STRENGTH or unlike >= BAD_LOSS:
            return "no"
        return "partly" if off > GOOD_STRENGTH or unlike > GOOD_LOSS else "yes"

    @property
    def ok(self) -> bool:
        return self.judgement != "no"

    @property
    def verdict(self) -> str:
        """The judgement in one sentence."""
        n_tokens = self.merged.n_tokens
        if not n_tokens:
            return "the adapter answers these prompts with nothing, so nothing was compared: give others with --prompt"
        found = f"{self.judgement}: {self._found()}" if self.judgement else self._found()
        return f"{found} (of {n_tokens} tokens only: give more prompts to be sure)" if n_tokens < SURE else found

    def _found(self) -> str:
        name, lost = self.merged_name, f"{self.lost:.0%} of the adapter's effect lost"
        same = (
            f"the same next token {self.merged.same:.0%} of the time (the adapter, asked again: {self.again.same:.0%}, "
            f"the base: {self.base.same:.0%})"
        )
        if self.judgement == "no":
            return f"{name} {self._wrong()}: {same}"
        if self.judgement == "partly":
            return (
                f"{name} has {self.merged.strength:.0%} of the strength of the adapter's effect, {lost}, {same}: "
                "--type Q8_0 or --max-growth 5% keep more, unless it was merged at another --scale"
            )
        if self.judgement == "yes":
            return f"{name} answers as the adapter at run time: {same}, {lost}"
        return (
            f"{name} answers as the adapter at run time, but so does the base: give prompts of the kind that the "
            "adapter was trained on"
        )

    def _wrong(self) -> str:
        merged = self.merged
        if self.shows and merged.own < UNCHANGED * merged.wanted:
            return "answers as the base does, not as the adapter at run time"
        if merged.likeness > ALIKE and abs(merged.strength - 1) > GOOD_STRENGTH:
            return f"has the adapter's effect at {merged.strength:.0%} of its strength, as of another --scale"
        return "answers neither as the base does nor as the adapter at run time"

    def as_dict(self) -> dict:
        """Return the report as plain data for JSON; divergences are in nats."""
        return {
            "ok": self.ok,
            "judgement": self.judgement,
            "verdict": self.verdict,
            "n_tokens": self.merged.n_tokens,
            "lost": self.lost,
            **{name: getattr(self, name).as_dict() for name in NEAR},
            "prompts": [part.as_dict() for part in self.spoken],
        }
