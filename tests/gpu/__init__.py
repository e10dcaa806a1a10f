"""What one GPU is asked: a probe of the driver and of torch, and training with kills. `make gpu` runs both."""
