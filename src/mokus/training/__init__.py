"""How stage 1 runs on more than one process, compiled, or for many concepts."""
