"""What a run leaves behind: its journal on disk, and the mirror that copies journals to MLflow."""
