"""The forward pass of all models and all levels, and the sets of operations that it is made of."""
