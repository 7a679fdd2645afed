"""What a person runs: the `zorl` command, the scripts and the browser app."""
