"""Pictures of what a command did: one self-contained page, and plots. Needs the extra ``report``, vl-convert."""
