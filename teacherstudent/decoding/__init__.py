"""From posteriors to words: graphs, search, lattices, scoring; the `evaluate` step."""
