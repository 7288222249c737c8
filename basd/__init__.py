"""BASD: an ablation platform for distilling vision transformers."""

__version__ = "0.1.0"
