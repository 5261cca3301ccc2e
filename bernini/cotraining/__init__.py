"""Planner and renderer, trained together."""
