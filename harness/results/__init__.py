"""Rows on disk, what they mean and whether they count."""
