"""From audio to features: importing data, the `prepare` step, reading features, packed shards."""
