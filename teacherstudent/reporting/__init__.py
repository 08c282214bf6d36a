"""The `report` step: one HTML page."""
