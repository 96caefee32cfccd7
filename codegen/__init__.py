"""What becomes a kernel: loop skeletons, printers, targets, launch, cache and tuning; it knows no mechanism by name."""
