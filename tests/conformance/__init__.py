"""Conformance: whatever torch offers is measured right or refused. Run by itself: ``make test-conformance``."""
