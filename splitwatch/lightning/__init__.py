"""The Lightning front door."""
