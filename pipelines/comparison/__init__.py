"""Compare configurations by paired trainings."""
