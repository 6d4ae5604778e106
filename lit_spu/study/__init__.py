"""Estimate, run and compare methods: memory estimates, grids of runs, their results and a report."""
