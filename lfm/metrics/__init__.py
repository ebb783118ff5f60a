"""Metrics of generated images: feature networks, reference statistics, distances between feature sets, paired scores.

A metric is a module here and an entry of the table in `pipelines.evaluation.metric_table`.
"""
