"""Measures an OpenAI-compatible server from outside: workloads, client processes, figures, comparison, plots."""
