"""Requests to a model: what may be asked of it, and the checks of that."""
