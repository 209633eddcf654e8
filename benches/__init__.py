"""The benches of bench.py: each measures one thing, and returns the tables that it prints."""
