"""Where keys and values live: blocks, who owns them, and what of them is known to a later request."""
