"""The ablations: one YAML per table."""
