"""The naive level: GPT-2 as a listing to read, the oracle of the other levels."""
