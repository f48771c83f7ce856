"""How a merged file is judged: what each tensor should hold, what it holds instead."""
