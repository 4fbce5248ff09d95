"""Notice stationary points."""
