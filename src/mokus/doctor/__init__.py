"""`mokus doctor`: what a task needs of a machine, known before it runs."""
