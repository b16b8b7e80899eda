"""The ways that bytes go from sources to targets, and which of them a plan takes."""
