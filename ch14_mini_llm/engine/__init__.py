"""Requests: what may be asked, which of them runs in the next step, and what becomes of the tokens."""
