"""Hydra groups: data, teacher, student, recipe and method (presets)."""
