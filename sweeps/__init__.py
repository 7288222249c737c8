"""The sweeps: one YAML per Optuna study."""
