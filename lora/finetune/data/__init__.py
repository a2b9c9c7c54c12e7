"""Reads data files and the hub, renders conversations, and makes batches of token ids."""
