"""Tasks that need no download: one file a task."""
