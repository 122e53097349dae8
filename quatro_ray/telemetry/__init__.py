"""Records of a run: metrics, timeline, events, notes, logging, the progress line and the report."""
