"""Training: the core's one use of Lightning. Inference never imports this package."""
