"""The whole way of a merge, from what the user asked for to the sums of what was kept.

    options     what the user asked for, checked
    plan        tensor by tensor: what is added (tensor, new_tokens), the type it gets (types), what grows (growth)
    chunks      runs of rows with all that they need; a tensor's weighting (importance) is attached when its turn comes
    rows        one chunk from bytes to bytes: add, decide, move the grid (refit) and round (rounding, halves), or find
                another grid (regrid), encode, count
    work        many chunks in threads (limits, scratch): read, rows, write
    tasks       the same in other processes, by an executor
    retention   what was kept, with steps, and what effect is lost (loss); forecast is the same on a sample of rows
    layout, naming, provenance, identity, modelfile, chat     what is written, where, and what the file says of itself

A step asks none that comes after it, but for growth, which merges some rows to see what it is worth.
"""
