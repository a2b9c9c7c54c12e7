"""Connects to other tools: loralib, GGUF, vLLM, the LM Evaluation Harness, Trainer."""
