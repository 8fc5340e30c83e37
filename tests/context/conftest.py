"""What the tests of the overlay share."""

from __future__ import annotations

from tests.context import OVERLAY

__all__ = ["OVERLAY"]
