"""Ablations as grids: plan, ledger, workers, status."""
