"""The model as data: its sizes, its weight file, and the layout of that file."""
