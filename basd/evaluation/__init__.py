"""Evaluation of trained students."""
