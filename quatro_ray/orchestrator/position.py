"""The policy version and the step of a run."""

from __future__ import annotations


class Position:
    """The policy that the engines have, and the newest version that was issued; versions only increase.

    Attributes:
        version: the policy version that the engines have.
        step: optimiser steps of that policy.
        issued: the newest version; larger than `version` between a commit and the weight update that follows.
    """

    def __init__(self) -> None:
        self.version = 0
        self.step = 0
        self.issued = 0

    def issue(self, version: int) -> None:
        """Record a version that the ledger has issued."""
        self.issued = version

    def move(self, version: int, step: int) -> None:
        """Record the version that the engines have after a weight update."""
        self.version, self.step = version, step
