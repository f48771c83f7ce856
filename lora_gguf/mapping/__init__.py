"""From Hugging Face modules to GGUF tensors: names, layouts, experts, heads, vocabularies."""
