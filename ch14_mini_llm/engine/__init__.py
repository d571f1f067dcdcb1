"""Requests to a model: what may be asked of one, and the checks."""
