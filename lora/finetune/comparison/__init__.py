"""Compares methods: the statistics of their scores."""
