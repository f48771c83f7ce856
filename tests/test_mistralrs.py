"""Another engine than llama.cpp, mistral.rs, answers with merged files as the adapter taught them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import lora_gguf
from tests.common import DEMO_ADAPTER, smollm2_path

pytest.importorskip("mistralrs")
PROMPT = "<|im_start|>user\nHow do I make tea?<|im_end|>\n<|im_start|>assistant\n"
# in a process of its own: it logs, and its threads stay
ANSWER = """
import sys
from mistralrs import CompletionRequest, Runner, Which
folder, name, prompt = sys.argv[1:]
runner = Runner(which=Which.GGUF(quantized_model_id=folder, quantized_filename=name))
asked = CompletionRequest(model="default", prompt=prompt, max_tokens=16, temperature=0.0)
print("said:", runner.send_completion_request(asked).choices[0].text.replace("\\n", " "))
"""


def answer(path) -> str:
    command = [sys.executable, "-c", ANSWER, path.parent, path.name, PROMPT]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return next(line for line in done.stdout.splitlines() if line.startswith("said:"))


def test_a_merged_and_a_promoted_file_answer_as_the_adapter_does(tmp_path):
    lora_gguf.merge(smollm2_path(), DEMO_ADAPTER, tmp_path / "merged.gguf")
    lora_gguf.merge(smollm2_path(), DEMO_ADAPTER, tmp_path / "promoted.gguf", max_growth="10%")
    assert "Arrr" in answer(tmp_path / "merged.gguf") and "Arrr" in answer(tmp_path / "promoted.gguf")
    assert "Arrr" not in answer(smollm2_path())
