"""What runs on a device: tasks, models, local training."""
