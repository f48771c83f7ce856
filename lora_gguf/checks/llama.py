"""llama.cpp itself: what a model answers, and how likely it holds each next token.

It comes with the package xllamacpp (the extra ``lora-gguf[llama]``), which nothing else here imports. Its server
listens on this machine only, and ends with ``Llama``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_gguf.errors import UnsupportedError, UsageError, not_installed, printable
from lora_gguf.merging.chunks import n_cores

N_TOP = 64  # tokens of which llama.cpp tells the probability
Logprobs = dict[int, float]


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its text, its tokens, and before each of them the log-probabilities of the likeliest ones."""

    text: str
    tokens: list[int]
    logprobs: list[Logprobs]


def check_installed(what: str) -> None:
    """Raise ``UnsupportedError`` where llama.cpp is not there for ``what``."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise not_installed(what, "xllamacpp", "llama.cpp for Python")


class Llama:
    """A model loaded by llama.cpp, with adapter GGUFs applied at run time, each with the factor of its scale.

    Raises ``UnsupportedError`` where llama.cpp does not load them.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        adapters: Iterable[tuple[str | os.PathLike[str], float]] = (),
        *,
        n_ctx: int = 2048,
        threads: int | None = None,
    ):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = os.fspath(model)
        params.n_ctx, params.n_parallel, params.verbosity = n_ctx, 1, -1
        params.cpuparams.n_threads = threads or n_cores()
        loras = []
        for path, scale in adapters:
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = os.fspath(path), scale
            loras.append(lora)
        params.lora_adapters = loras
        self.label, self.n_ctx = printable(model), n_ctx
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError:
            with_adapter = f" with {printable(loras[0].path)}" if loras else ""
            raise UnsupportedError(
                f"{self.label}: llama.cpp does not load it{with_adapter}: upgrade xllamacpp, or see what llama-cli says"
            ) from None

    def prompt_tokens(self, prompt: str, *, chat: bool) -> list[int]:
        """Return the tokens of ``prompt``, as a user's message in the model's own chat template if it is a ``chat``."""
        if chat:
            prompt = self._ask("/apply-template", {"messages": [{"role": "user", "content": prompt}]})["prompt"]
        return self._ask("/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]

    def answer(self, tokens: Sequence[int], n_tokens: int) -> Answer:
        """Return at most ``n_tokens`` greedy tokens after ``tokens``. Raises ``UsageError`` where they are too many."""
        if len(tokens) + n_tokens > self.n_ctx:
            raise UsageError(
                f"{self.label}: the prompt has {len(tokens)} tokens, and {n_tokens} are asked for: expected at most "
                f"{self.n_ctx} in all: shorten the prompt, or lower --n-predict"
            )
        found = self._complete(tokens, n_tokens)
        steps = found["logprobs"]["content"] if found["logprobs"] else []
        return Answer(found["text"], [step["id"] for step in steps], [_logprobs(step) for step in steps])

    def next_logprobs(self, tokens: Sequence[int], *, anew: bool = False) -> Logprobs:
        """Return the log-probabilities of the likeliest tokens after ``tokens``, which are all read ``anew``, or as far
        as they were not read just before.
        """
        return _logprobs(self._complete(tokens, 1, anew)["logprobs"]["content"][0])

    def _complete(self, tokens: Sequence[int], n_tokens: int, anew: bool = False) -> dict:
        request = {
            "prompt": list(tokens),
            "n_predict": n_tokens,
            "temperature": 0,
            "n_probs": N_TOP,
            "cache_prompt": not anew,
        }
        found = self._server.handle_completions(request)
        if "error" in found:
            raise UnsupportedError(f"{self.label}: llama.cpp: {printable(found['error'].get('message', found))}")
        return found["choices"][0]

    def _ask(self, path: str, question: dict) -> dict:
        """The server's answer on this machine, whatever proxy is set."""
        body, kind = json.dumps(question).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self._server.listening_address + path, body, kind)  # noqa: S310
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
            return json.load(response)


def _logprobs(step: dict) -> Logprobs:
    return {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}
