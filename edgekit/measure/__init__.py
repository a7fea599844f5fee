"""Latency by measuring: workers, rounds, statistics, conditions, reports."""
