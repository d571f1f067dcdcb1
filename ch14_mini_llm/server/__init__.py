"""OpenAI's API over the engine: what a client may ask for, and what it is answered. `serve.py` starts it."""
