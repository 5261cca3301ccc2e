"""Layouts of weights outside this project, and the way to them and back."""
