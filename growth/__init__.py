"""Grow a trained checkpoint into a larger model that computes the same (docs/growth.md)."""
