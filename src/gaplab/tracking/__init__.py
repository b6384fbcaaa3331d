"""What a run leaves behind: a journal on disk, and the same in MLflow."""
