"""Whole flows as short readable scripts."""
