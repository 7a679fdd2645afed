"""The programs that people run: the `zorl` command, the scripts and the browser app."""
