"""Convert LoRA adapters to GGUF, and merge them into quantized GGUF models."""

__version__ = "0.1.0"
