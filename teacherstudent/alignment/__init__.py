"""Which phone every frame belongs to: the `align` step, importers of alignments, the flat start."""
