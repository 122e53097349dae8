"""The real controller, fleet and buffer on a virtual clock, with engines and a learner that only take time."""
