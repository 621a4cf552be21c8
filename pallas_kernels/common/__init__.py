"""What the kernels share: schedules, masks, barriers and checks."""
