"""Many requests on one model: what runs in the next step, and what becomes of the tokens."""
