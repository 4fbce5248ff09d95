"""Plan and change."""
