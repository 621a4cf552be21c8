"""Decoder-only models, and the contract that they implement."""
