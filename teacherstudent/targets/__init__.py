"""What the target store is made of: codings, catalogue, shards behind URLs, the `store` command."""
