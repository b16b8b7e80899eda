"""Weights in safetensors files and in messages: checked, read, written and listed."""
