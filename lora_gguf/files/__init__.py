"""Files in and out: GGUF, safetensors, PyTorch's zip, importance matrices; read by position, written whole or not at
all.
"""
