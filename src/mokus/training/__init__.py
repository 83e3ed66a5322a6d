"""What stage 1 needs besides its loss, and how it runs on more than one process, compiled, or for many concepts."""
