"""Pallas GPU kernels: arrays in, arrays out; one kernel a file."""
