"""Rows, figures and limits: whatever is computed from a run, and how it is kept."""
