"""What the program does: one module a command, one function each."""
