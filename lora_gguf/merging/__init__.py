"""The whole way of a merge, from what the user asked for to the sums of what was kept.

    options     what the user asked for, checked
    plan        tensor by tensor: what is added (tensor), the type it gets (types), what grows (growth)
    chunks      runs of rows with all that they need; a tensor's weighting (importance) is attached when its turn comes
    rows        one chunk from bytes to bytes: decode, add, decide, round (rounding), move the grid (refit), encode, count
    work        many chunks in threads: read, rows, write
    retention   what was kept, with steps; forecast is the same on a sample of rows
    layout, naming, provenance, identity, modelfile     what is written, where, and what the file says of itself

Nothing flows back.
"""
