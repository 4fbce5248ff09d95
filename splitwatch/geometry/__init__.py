"""Measure and classify."""
