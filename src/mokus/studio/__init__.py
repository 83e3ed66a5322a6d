"""What runs for long: jobs in a worker process of their own, and a server of images over the same worker."""
