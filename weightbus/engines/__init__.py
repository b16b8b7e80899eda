"""Inference engines that take part by themselves: what a user of one needs to write is a backend's name."""
