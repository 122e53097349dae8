"""The durable life of every group, staleness rules, and packing."""
