"""The replay buffer: the durable state of every group, the staleness rules, and packing into micro-batches."""
