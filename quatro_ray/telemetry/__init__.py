"""Metrics, timeline, progress, report: written in one place each."""
