"""What a merge writes, as a user sees it: the names of the files, their shards, the Modelfile beside them."""
