"""The front end: runs a diffusers pipeline once without weights and writes down its program."""
