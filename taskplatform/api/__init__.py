"""The control API: what the Python API and the commands do, over HTTPS."""
